"""What formats need that have one integer width for a whole linear, and groups of one size.

A group of width b fits any larger width as it is: its codes and its zero point are small integers
there, and its scale is the same. Only width 1, whose zero points are eighths, becomes width 4, in
steps an eighth as wide. Without zero points, code - zero takes a bit more for its sign. A size that
divides K stands for a short last group: every part of a group repeats the group's grid. A dropped
group becomes one of zeros, with scale 0. So no value changes; bytes do. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from bitmill.config.bit_width_map import DROPPED, GROUP_SIZE, WIDTHS
from bitmill.errors import FormatError
from bitmill.formats.format import (
    Contents,
    Facts,
    Format,
    Refusal,
    packed_embeddings,
    transposed,
)
from bitmill.formats.loading import TRANSFORMERS, VLLM, Runtime
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.architectures import architecture
from bitmill.plan.model_plan import Plan, PlannedLinear


class OneWidthFormat(Format):
    """Base of safetensors formats with one width per linear, in groups of `group_size`.

    legal: the widths. config_key: of config.json, what says how linears are stored. quant_method:
    the method that it names.
    symmetric: no zero points but the one in the middle; a bit more per code for its sign.
    fused: linears that read one input (q/k/v, gate/up) have one width.
    """

    widths: ClassVar[frozenset[int] | None] = frozenset({DROPPED, *WIDTHS})
    legal: ClassVar[tuple[int, ...]]
    config_key: ClassVar[str] = "quantization_config"
    quant_method: ClassVar[str]
    runtimes: ClassVar[tuple[Runtime, ...]] = (TRANSFORMERS, VLLM)

    symmetric: bool = False
    fused: bool = True

    @classmethod
    def recognizes(cls, settings: Mapping[str, Any]) -> bool:
        """By the method that its `config_key` names."""
        found = settings.get(cls.config_key)
        return isinstance(found, dict) and found.get("quant_method") == cls.quant_method

    def refusals(self, facts: Facts) -> list[Refusal]:
        """What formats of one width refuse, beside what is not listed."""
        return super().refusals(facts) + refusals(facts, self.legal, self.symmetric)

    def takes(self, width: int) -> bool:
        """Whether one of its widths holds it."""
        return width_of([width], self.legal, self.symmetric) is not None

    def bits(self, contents: Contents) -> dict[str, int]:
        """The one width of each linear."""
        return widths_of(contents, self.legal, fused=self.fused, symmetric=self.symmetric)

    def linear_tensors(self, name: str, linear: PlannedLinear, bits: int) -> list[TensorInfo]:
        """The tensors of one linear, called `name` in files."""
        raise NotImplementedError

    def tensors(self, contents: Contents) -> list[TensorInfo]:
        """Those of each linear, then what is kept."""
        plan, bits = contents.plan, self.bits(contents)
        found = []
        for linear in plan.linears:
            name = stored_as(plan.model_type, linear.name)
            found += self.linear_tensors(name, linear, bits[linear.name])
        return found + [self.kept_tensor(plan, tensor.spec) for tensor in plan.tensors]

    def kept_tensor(self, plan: Plan, tensor: TensorInfo) -> TensorInfo:
        """How a tensor that is not quantized is stored: as it is, or in another dtype."""
        return tensor


def width_of(widths: Iterable[int], legal: Iterable[int], symmetric: bool) -> int | None:
    """The smallest legal width that groups of these widths fit, None where none does.

    symmetric: without zero points.
    """
    least = max(4 if width == 1 else width for width in widths) + symmetric
    return min((width for width in legal if width >= least), default=None)


def widths_of(
    contents: Contents, legal: tuple[int, ...], *, fused: bool, symmetric: bool
) -> dict[str, int]:
    """Linear -> its one width; fused: linears that read one input have the widest one's.

    Raises FormatError for a linear that no legal width fits.
    """
    plan, found = contents.plan, {}
    for name, widths in contents.widths.items():
        width = width_of(widths, legal, symmetric)
        if width is None:
            raise FormatError(
                f"{name} has groups of {max(widths)} bits, which fit none of {list(legal)}",
                param=name,
            )
        found[name] = width
    for block in range(plan.block_count) if fused else ():
        for names in plan.siblings(block):
            widest = max(found[name] for name in names)
            found.update(dict.fromkeys(names, widest))
    return found


def stored_as(model_type: str, name: str) -> str:
    """The name that published checkpoints, and so their runtimes, give a linear."""
    return architecture(model_type).stored(f"{name}.weight").removesuffix(".weight")


def group_size(columns: int) -> int:
    """The largest size that divides both 128 and K."""
    return math.gcd(GROUP_SIZE, columns)


def refusals(facts: Facts, legal: tuple[int, ...], symmetric: bool) -> list[Refusal]:
    """What such formats have no place for: packed embeddings, weights that lie as [K, N], and
    widths that fit none of the legal ones."""
    found = []
    beyond = [b for b in sorted(facts.widths) if width_of([b], legal, symmetric) is None]
    if beyond:
        without = " without zero points" if symmetric else ""
        found.append(
            Refusal(
                "allocation.widths",
                f"groups of {beyond} bits fit none of its widths {list(legal)}{without}: "
                "set allocation.max_bits lower",
            )
        )
    return found + packed_embeddings(facts) + transposed(facts)
