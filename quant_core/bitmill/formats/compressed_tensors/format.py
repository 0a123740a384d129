"""compressed-tensors, format "pack-quantized", as version 0.18 and later read it. Torch-free.

    weight_packed      i32 [N, ceil(K b / 32)]    codes in rows of bits
    weight_scale       f16 [N, K / size]
    weight_zero_point  i32 [ceil(N b / 32), K / size]    zero points in columns of bits
    weight_shape       i64 [2]

Codes and zero points are signed there, with 2^(b-1) added when they are packed: what is stored is
Bitmill's own code. One width per linear; config groups name the linears of each width and size.
The layout of 3, 5, 6 and 7 bits changed in 0.18 without another name: older readers fail on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from bitmill.formats.format import Contents, Facts, Format, Refusal
from bitmill.formats.one_width import group_size, refusals, stored_as, widths_of
from bitmill.io.safetensors import TensorInfo

QUANT_METHOD = "compressed-tensors"
LEGAL = (2, 3, 4, 5, 6, 7, 8)


class CompressedTensors(Format):
    """compressed-tensors pack-quantized (vLLM's WNA16), one width of 2 to 8 bits per linear.

    symmetric: no zero points, but a bit more per code for its sign; compressed-tensors 0.20 cannot
    load zero points into transformers' models, its own neither.
    fused: linears that read one input (q/k/v, gate/up) have one width, as runtimes that fuse them
    want it.
    """

    name: ClassVar[str] = "compressed-tensors"
    codec: ClassVar[str] = "bitmill.formats.compressed_tensors.codec:CompressedTensorsCodec"

    symmetric: bool = False
    fused: bool = True

    @classmethod
    def recognizes(cls, settings: Mapping[str, Any]) -> bool:
        """By the method that its quantization_config names."""
        found = settings.get("quantization_config")
        return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD

    def refusals(self, facts: Facts) -> list[Refusal]:
        """Packed embeddings and transposed linears, beside what is not listed."""
        return super().refusals(facts) + refusals(facts, LEGAL, self.symmetric)

    def bits(self, contents: Contents) -> dict[str, int]:
        """The one width of each linear."""
        return widths_of(contents, LEGAL, fused=self.fused, symmetric=self.symmetric)

    def tensors(self, contents: Contents) -> list[TensorInfo]:
        """Four for each linear, then what is kept."""
        plan, bits = contents.plan, self.bits(contents)
        found = []
        for linear in plan.linears:
            N, K, b = linear.rows, linear.columns, bits[linear.name]
            name = stored_as(plan.model_type, linear.name)
            groups = K // group_size(K)
            found += [
                TensorInfo(f"{name}.weight_packed", "I32", (N, -(-K * b // 32))),
                TensorInfo(f"{name}.weight_scale", "F16", (N, groups)),
                TensorInfo(f"{name}.weight_shape", "I64", (2,)),
            ]
            if not self.symmetric:
                zeros = (-(-N * b // 32), groups)
                found.append(TensorInfo(f"{name}.weight_zero_point", "I32", zeros))
        return found + [tensor.spec for tensor in plan.tensors]
