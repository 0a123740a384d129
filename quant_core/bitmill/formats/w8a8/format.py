"""compressed-tensors, formats "int-quantized" and "float-quantized": weights and activations in 8
bits. Torch-free.

    weight         i8 or E4M3 [N, K]
    weight_scale   f32 [N, 1]

A row has one scale, s = max |w| / 127, or / 448 in E4M3, since products of 8-bit integers or floats
are summed along it before they are scaled. So every weight is rounded once more, whatever width it
was packed at. Activations are rounded by the engine, each token with a scale of its own around 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

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

FORMATS = {"int8": "int-quantized", "fp8": "float-quantized"}
"""What compressed-tensors calls them."""
DTYPES = {"int8": "I8", "fp8": "F8_E4M3"}


class W8A8(Format):
    """compressed-tensors with 8-bit weights and activations, for engines that multiply so."""

    name: ClassVar[str] = "w8a8"
    codec: ClassVar[str] = "bitmill.formats.w8a8.codec:W8A8Codec"
    kinds: ClassVar[frozenset[str] | None] = None
    widths: ClassVar[frozenset[int] | None] = None
    rewrites: ClassVar[frozenset[str] | None] = None
    runtimes: ClassVar[tuple[Runtime, ...]] = (TRANSFORMERS, VLLM)

    dtype: Literal["int8", "fp8"] = "int8"

    @classmethod
    def recognizes(cls, settings: Mapping[str, Any]) -> bool:
        """By what compressed-tensors calls the format."""
        found = settings.get("quantization_config")
        return isinstance(found, dict) and found.get("format") in FORMATS.values()

    def refusals(self, facts: Facts) -> list[Refusal]:
        """Packed embeddings, and weights that lie as [K, N]."""
        return super().refusals(facts) + packed_embeddings(facts) + transposed(facts)

    def tensors(self, contents: Contents) -> list[TensorInfo]:
        """Two for each linear, then what is kept."""
        plan, stored = contents.plan, architecture(contents.plan.model_type).stored
        found = []
        for linear in plan.linears:
            name = stored(f"{linear.name}.weight")
            found.append(TensorInfo(name, DTYPES[self.dtype], (linear.rows, linear.columns)))
            found.append(TensorInfo(f"{name}_scale", "F32", (linear.rows, 1)))
        return found + [tensor.spec for tensor in plan.tensors]
