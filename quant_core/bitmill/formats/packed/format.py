"""Bitmill's own format, version 1 (docs/format.md), as budgets and plans see it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from bitmill.formats.format import Contents, Format, order_owners
from bitmill.formats.packed.config import FORMAT_VERSION, QUANT_METHOD
from bitmill.formats.packed.layout import stored_tensors
from bitmill.io.safetensors import TensorInfo


class Packed(Format):
    """Bit planes of every width, in the columns' order or another that is stored."""

    name: ClassVar[str] = "bitmill-1"
    codec: ClassVar[str] = "bitmill.formats.packed.checkpoint:PackedCodec"
    keeps_codes: ClassVar[bool] = True
    rewrites: ClassVar[frozenset[str] | None] = frozenset({"order"})

    @classmethod
    def recognizes(cls, settings: Mapping[str, Any]) -> bool:
        """By the method and the version that its quantization_config names."""
        found = settings.get("quantization_config")
        return isinstance(found, dict) and (
            (found.get("quant_method"), found.get("format_version"))
            == (QUANT_METHOD, FORMAT_VERSION)
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
        )
