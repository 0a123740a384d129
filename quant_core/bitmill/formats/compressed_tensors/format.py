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

from bitmill.formats.format import Facts
from bitmill.formats.loading import VLLM, Runtime
from bitmill.formats.one_width import OneWidthFormat, group_size
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.model_plan import PlannedLinear


class CompressedTensors(OneWidthFormat):
    """compressed-tensors pack-quantized (vLLM's WNA16), one width of 2 to 8 bits per linear.

    symmetric: compressed-tensors 0.20 cannot load zero points into transformers' models, its own
    neither. fused: as runtimes that fuse such linears want it.
    """

    name: ClassVar[str] = "compressed-tensors"
    codec: ClassVar[str] = "bitmill.formats.compressed_tensors.codec:CompressedTensorsCodec"
    legal: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 7, 8)
    quant_method: ClassVar[str] = "compressed-tensors"

    @classmethod
    def loading(cls, settings: Mapping[str, Any]) -> tuple[Runtime, ...]:
        """By vLLM; by transformers too where there are no zero points, which it cannot load."""
        groups = settings[cls.config_key].get("config_groups", {}).values()
        symmetric = all(group["weights"]["symmetric"] for group in groups)
        return cls._readers(symmetric)

    def readers(self, facts: Facts) -> tuple[Runtime, ...]:
        """As `loading`."""
        return self._readers(self.symmetric)

    @classmethod
    def _readers(cls, symmetric: bool) -> tuple[Runtime, ...]:
        return cls.runtimes if symmetric else (VLLM,)

    def linear_tensors(self, name: str, linear: PlannedLinear, bits: int) -> list[TensorInfo]:
        """Three, and zero points unless symmetric."""
        N, K = linear.rows, linear.columns
        groups = K // group_size(K)
        found = [
            TensorInfo(f"{name}.weight_packed", "I32", (N, -(-K * bits // 32))),
            TensorInfo(f"{name}.weight_scale", "F16", (N, groups)),
            TensorInfo(f"{name}.weight_shape", "I64", (2,)),
        ]
        if not self.symmetric:
            zeros = (-(-N * bits // 32), groups)
            found.append(TensorInfo(f"{name}.weight_zero_point", "I32", zeros))
        return found
