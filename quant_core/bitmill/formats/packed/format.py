"""Bitmill's own format (docs/format.md), as budgets and plans see it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from bitmill.config.codes import CODES
from bitmill.formats.format import Contents, Facts, Format, Order, Refusal, order_owners
from bitmill.formats.packed.config import QUANT_METHOD, VERSIONS, WITH_OUTLIERS
from bitmill.formats.packed.layout import stored_tensors
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.model_plan import Plan
from bitmill_kernels.trellis.layout import tile_bytes, tile_count

BITMILL = """Bitmill, which checks every tensor:
```python
import bitmill

model = bitmill.load("REPO")
```"""
WITH_TRANSFORMERS = """transformers:
```python
import bitmill.hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("REPO")
```"""
WITH_VLLM = """vLLM, with the plug-in `bitmill-vllm`:
```sh
vllm serve REPO --dtype float32
```"""


class Packed(Format):
    """Version 1: bit planes of every width, in the columns' order or one that is stored; version
    3 where some linears keep columns in 16 bits beside them.

    code: of all groups, by its name in `config.codes.CODES`.
    """

    name: ClassVar[str] = "bitmill-1"
    codec: ClassVar[str] = "bitmill.formats.packed.checkpoint:PackedCodec"
    headers: ClassVar[str | None] = "bitmill.formats.packed.headers:PackedHeaders"
    keeps_codes: ClassVar[bool] = True
    widths: ClassVar[frozenset[int] | None] = frozenset(CODES["affine"].legal)
    rewrites: ClassVar[frozenset[str] | None] = frozenset({"order", "outliers"})
    runtimes: ClassVar[tuple[str, ...]] = (BITMILL, WITH_TRANSFORMERS, WITH_VLLM)
    code: ClassVar[str] = "affine"
    versions: ClassVar[tuple[int, ...]] = (VERSIONS["affine"], WITH_OUTLIERS)

    @classmethod
    def loading(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """All, but vLLM's plug-in refuses outlier columns and packed experts."""
        own = settings["quantization_config"]
        experts = any(".experts." in name for name in own["linears"])
        refused = own["format_version"] == WITH_OUTLIERS or experts
        return tuple(one for one in cls.runtimes if one != WITH_VLLM or not refused)

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
        )


class PackedTrellis(Packed):
    """Version 2: circles of bits, rotated columns, a scale per row and one per group."""

    name: ClassVar[str] = "bitmill-2"
    kinds: ClassVar[frozenset[str]] = frozenset({"trellis"})
    widths: ClassVar[frozenset[int] | None] = frozenset(CODES["trellis"].legal)
    rewrites: ClassVar[frozenset[str] | None] = frozenset({"order", "rotation"})
    code: ClassVar[str] = "trellis"
    versions: ClassVar[tuple[int, ...]] = (VERSIONS["trellis"],)

    def refusals(self, facts: Facts) -> list[Refusal]:
        """Besides: a model whose columns are not rotated."""
        found = super().refusals(facts)
        if "rotation" not in facts.rewrites:
            found.append(Refusal("rotation", "its columns are rotated, those of the model are not"))
        return found

    def group_bytes(self, width: int, rows: int, columns: int) -> int:
        """Circles and the group's scale."""
        return tile_count(rows) * tile_count(columns) * tile_bytes(width) + 2

    def fixed_bytes(self, plan: Plan, order: Order) -> int:
        """Those of orders, and a scale per row."""
        return super().fixed_bytes(plan, order) + sum(2 * linear.rows for linear in plan.linears)
