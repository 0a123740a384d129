"""Plain safetensors: every quantized weight as the numbers that it stands for. Torch-free.

Runs wherever the source ran, without Bitmill. In float32 nothing is lost; shorter dtypes round each
weight once more, and take the size of the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from bitmill.formats.format import Contents, Format
from bitmill.formats.loading import TRANSFORMERS, VLLM, Runtime
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.architectures import architecture

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Dequantized(Format):
    """Plain safetensors of any dtype, for every runtime that ran the source."""

    name: ClassVar[str] = "dequantized"
    codec: ClassVar[str] = "bitmill.formats.dequantized.codec:DequantizedCodec"
    kinds: ClassVar[frozenset[str] | None] = None
    widths: ClassVar[frozenset[int] | None] = None
    rewrites: ClassVar[frozenset[str] | None] = None
    runtimes: ClassVar[tuple[Runtime, ...]] = (TRANSFORMERS, VLLM)

    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"

    @classmethod
    def recognizes(cls, settings: Mapping[str, Any]) -> bool:
        """A model without any quantization."""
        return not {"quantization_config", "quantization"} & settings.keys()

    def tensors(self, contents: Contents) -> list[TensorInfo]:
        """One weight for each linear and embedding, then what is kept, all in `dtype`."""
        plan, dtype = contents.plan, DTYPES[self.dtype]
        found = architecture(plan.model_type)
        weights = []
        for matrix in plan.matrices:
            shape = (matrix.rows, matrix.columns)
            if found.transposed and matrix.block >= 0:
                shape = (matrix.columns, matrix.rows)
            weights.append(TensorInfo(found.stored(f"{matrix.name}.weight"), dtype, shape))
        kept = [
            replace(tensor.spec, dtype=dtype) if tensor.dtype in FLOATS else tensor.spec
            for tensor in plan.tensors
        ]
        return weights + kept


FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
