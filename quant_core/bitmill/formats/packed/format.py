"""Bitmill's own format (docs/format.md), as budgets and plans see it. Torch-free."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from bitmill.config.bit_width_map import group_bytes
from bitmill.config.codes import CODES
from bitmill.formats.format import Contents, Facts, Format, Order, Refusal, order_owners
from bitmill.formats.loading import Runtime
from bitmill.formats.packed.config import QUANT_METHOD, VERSIONS, WITH_AFFINE, WITH_OUTLIERS
from bitmill.formats.packed.layout import stored_tensors
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.model_plan import Plan
from bitmill_kernels.trellis.layout import tile_bytes, tile_count

BITMILL = Runtime(
    "Bitmill",
    """Bitmill, which checks every tensor:
```python
import bitmill

model = bitmill.load("REPO")
```""",
)
WITH_TRANSFORMERS = Runtime(
    "transformers with bitmill.hf",
    """transformers:
```python
import bitmill.hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("REPO")
```""",
)
WITH_VLLM = Runtime(
    "vLLM with bitmill-vllm",
    """vLLM, with the plug-in `bitmill-vllm`:
```sh
vllm serve REPO --dtype float32
```""",
)
WITH_SGLANG = Runtime(
    "SGLang with bitmill-sglang",
    """SGLang, with the plug-in `bitmill-sglang`:
```sh
python -m sglang.launch_server --model-path REPO --disable-cuda-graph
```""",
)
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that engines compute as one."""


class Packed(Format):
    """Version 1: bit planes of every width, in the columns' order or one that is stored; version
    3 where some linears keep columns in 16 bits beside them.

    code: of the groups of all linears, by its name in `config.codes.CODES`; packed embeddings and
    heads are in affine codes.
    """

    name: ClassVar[str] = "bitmill-1"
    codec: ClassVar[str] = "bitmill.formats.packed.checkpoint:PackedCodec"
    headers: ClassVar[str | None] = "bitmill.formats.packed.headers:PackedHeaders"
    keeps_codes: ClassVar[bool] = True
    widths: ClassVar[frozenset[int] | None] = frozenset(CODES["affine"].legal)
    rewrites: ClassVar[frozenset[str] | None] = frozenset({"order", "outliers"})
    runtimes: ClassVar[tuple[Runtime, ...]] = (BITMILL, WITH_TRANSFORMERS, WITH_VLLM, WITH_SGLANG)
    code: ClassVar[str] = "affine"
    versions: ClassVar[tuple[int, ...]] = (VERSIONS["affine"], WITH_OUTLIERS)

    @classmethod
    def loading(cls, settings: Mapping[str, Any]) -> tuple[Runtime, ...]:
        """All, but the engines' plug-ins as `readers` says."""
        own = settings["quantization_config"]
        return _readers(own["linears"], outliers=own["format_version"] == WITH_OUTLIERS)

    def readers(self, facts: Facts) -> tuple[Runtime, ...]:
        """All, but the plug-ins of vLLM and SGLang refuse outlier columns, packed experts, and q, k
        and v or gate and up of which some are kept."""
        names = {linear.name for linear in facts.plan.linears}
        return _readers(names, outliers="outliers" in facts.rewrites)

    @classmethod
    def recognizes(cls, settings: Mapping[str, Any]) -> bool:
        """By the method and the version that its quantization_config names."""
        found = settings.get("quantization_config")
        return (
            isinstance(found, dict)
            and found.get("quant_method") == QUANT_METHOD
            and found.get("format_version") in cls.versions
        )

    def tensors(self, contents: Contents) -> list[TensorInfo]:
        """The linears' in the plan's order, then what is kept."""
        plan = contents.plan
        owners = order_owners(plan, contents.order)
        return stored_tensors(
            [tensor.spec for tensor in plan.tensors],
            plan.shapes,
            contents.widths,
            {name: f"{owner}.order" for name, owner in owners.items()},
            self.code,
            contents.outliers,
            {matrix.name for matrix in plan.embeddings},
        )


def _readers(linears: Collection[str], *, outliers: bool) -> tuple[Runtime, ...]:
    """Of a folder with these packed linears."""
    engines = not outliers and not any(
        ".experts." in name or _cut(name, linears) for name in linears
    )
    return tuple(one for one in Packed.runtimes if one not in (WITH_VLLM, WITH_SGLANG) or engines)


def _cut(name: str, linears: Collection[str]) -> bool:
    """Whether a linear is packed and another one that engines join with it is not."""
    stem, _, last = name.rpartition(".")
    joined = next((names for names in _JOINED if last in names), ())
    return any(f"{stem}.{other}" not in linears for other in joined)


class PackedTrellis(Packed):
    """Version 2: circles of bits, rotated columns, a scale per row and one per group; version 4
    where the embedding and the head are packed too, as in version 1."""

    name: ClassVar[str] = "bitmill-2"
    kinds: ClassVar[frozenset[str]] = frozenset({"trellis"})
    widths: ClassVar[frozenset[int] | None] = frozenset(CODES["trellis"].legal)
    rewrites: ClassVar[frozenset[str] | None] = frozenset({"order", "rotation"})
    code: ClassVar[str] = "trellis"
    versions: ClassVar[tuple[int, ...]] = (VERSIONS["trellis"], WITH_AFFINE)

    def refusals(self, facts: Facts) -> list[Refusal]:
        """Besides: a model whose columns are not rotated."""
        found = super().refusals(facts)
        if "rotation" not in facts.rewrites:
            found.append(Refusal("rotation", "its columns are rotated, those of the model are not"))
        return found

    def group_bytes(self, width: int, rows: int, columns: int) -> int:
        """Circles and the group's scale."""
        return tile_count(rows) * tile_count(columns) * tile_bytes(width) + 2

    def embedding_group_bytes(self, width: int, rows: int, columns: int) -> int:
        """Affine codes, scales and zeros."""
        return group_bytes(width, rows, columns)

    def fixed_bytes(self, plan: Plan, order: Order) -> int:
        """Those of orders, and a scale per row."""
        return super().fixed_bytes(plan, order) + sum(2 * linear.rows for linear in plan.linears)
