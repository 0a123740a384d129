"""ExLlamaV2's format, with a width per group. Torch-free.

    q_weight     i32 [sum of c b / 32, N]    codes, a stream of bits down the columns of each group
    q_groups     i16 [2 G]                   width and first row in q_weight of each group
    q_scale      i32 [G, N / 8]              k - 1 in 4 bits
    q_scale_max  f16 [G]                     256 m: w = k^2 m (code - 2^(b-1))
    q_invperm    i32 [K]                     where each input lies among the packed columns

Groups lie by falling width, whatever their place in the linear; `q_invperm` says where columns
went. Only what was solved on that grid fits (`quant/exl2_grid.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from bitmill.config.bit_width_map import group_columns
from bitmill.config.methods import METHODS
from bitmill.formats.exl2.settings import ARCHITECTURES, prefix, unsaid
from bitmill.formats.format import Contents, Facts, Format, Refusal, packed_embeddings
from bitmill.formats.loading import Runtime
from bitmill.formats.one_width import stored_as
from bitmill.io.safetensors import TensorInfo

QUANT_METHOD = GRID = "exl2"
_SOLVE = [name for name in METHODS.names() if METHODS[name].grid == GRID]
OFF_GRID = f"its grid holds only what was solved on it: quantize with method {' or '.join(_SOLVE)}"
ALIGNED, MOST_COLUMNS = 32, 65535
EXLLAMAV2 = Runtime(
    "ExLlamaV2",
    """ExLlamaV2, in a clone of its repository:
```sh
hf download REPO --local-dir model
python test_inference.py -m model -p "The river"
```""",
)


class Exl2(Format):
    """ExLlamaV2 (exl2), the widths of every group as they are; what is kept becomes float16."""

    name: ClassVar[str] = "exl2"
    codec: ClassVar[str] = "bitmill.formats.exl2.codec:Exl2Codec"
    widths: ClassVar[frozenset[int]] = frozenset({2, 3, 4, 5, 6, 8})
    rewrites: ClassVar[frozenset[str]] = frozenset({"order"})
    runtimes: ClassVar[tuple[Runtime, ...]] = (EXLLAMAV2,)

    @classmethod
    def recognizes(cls, settings: Mapping[str, Any]) -> bool:
        """By the method that its quantization_config names."""
        found = settings.get("quantization_config")
        return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD

    def refusals(self, facts: Facts) -> list[Refusal]:
        """Other methods and architectures, settings that it does not read, packed embeddings, and
        sides that are no multiples of 32, beside what is not listed."""
        found = super().refusals(facts)
        if facts.grid not in (None, GRID):
            found.append(Refusal("refinement.method", OFF_GRID))
        kind = facts.plan.model_type
        if kind not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            found.append(Refusal(kind, f"models of this type are not written, only {known}"))
        found += [Refusal("config.json", why) for why in unsaid(facts.config)]
        found += packed_embeddings(facts)
        for linear in facts.plan.linears:
            sides = linear.rows, linear.columns
            if any(side % ALIGNED for side in sides) or linear.columns > MOST_COLUMNS:
                found.append(
                    Refusal(
                        linear.name,
                        f"its sides {sides[0]} and {sides[1]} must be multiples of {ALIGNED}, the "
                        f"second at most {MOST_COLUMNS}",
                    )
                )
                break
        return found

    def tensors(self, contents: Contents) -> list[TensorInfo]:
        """Five of each linear, then what is kept."""
        plan, found = contents.plan, []
        for linear in plan.linears:
            name = stored_name(plan.model_type, linear.name)
            widths, N, K = contents.widths[linear.name], linear.rows, linear.columns
            sizes = zip(widths, group_columns(K), strict=True)
            words = sum(width * count // 32 for width, count in sizes)
            found += [
                TensorInfo(f"{name}.q_weight", "I32", (words, N)),
                TensorInfo(f"{name}.q_groups", "I16", (2 * len(widths),)),
                TensorInfo(f"{name}.q_scale", "I32", (len(widths), N // 8)),
                TensorInfo(f"{name}.q_scale_max", "F16", (len(widths),)),
                TensorInfo(f"{name}.q_invperm", "I32", (K,)),
            ]
        for tensor in plan.tensors:
            dtype = "F16" if tensor.spec.dtype in ("F32", "BF16") else tensor.spec.dtype
            name = prefix(plan.model_type) + tensor.spec.name
            found.append(TensorInfo(name, dtype, tensor.spec.shape))
        return found


def stored_name(model_type: str, name: str) -> str:
    """What its tensors' names begin with, of a linear."""
    return prefix(model_type) + stored_as(model_type, name)
