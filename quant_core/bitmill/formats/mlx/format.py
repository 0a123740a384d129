"""Affine checkpoints of MLX, as mlx-lm reads them. Torch-free.

    weight  u32 [N, K b / 32]    codes in rows of bits
    scales  f32 [N, K / size]
    biases  f32 [N, K / size]    -scale * zero: w = scale * code + bias

Scales and biases are in fp32, where scale * code, the bias and their sum are exact. In fp16 a bias
is exact only if its zero point is a power of two, as the one in the middle is (`symmetric`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from bitmill.formats.format import Facts, Refusal
from bitmill.formats.loading import Runtime
from bitmill.formats.older_settings import not_granted
from bitmill.formats.one_width import OneWidthFormat, group_size
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.model_plan import Plan, PlannedLinear

SIZES = (32, 64, 128)
KNOWN = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Model types that mlx-lm computes as transformers does, by the same names."""
MLX_LM = Runtime(
    "mlx-lm",
    """mlx-lm:
```sh
mlx_lm.generate --model REPO --prompt "The river"
```""",
)
_STORED = {"float32": "F32", "float16": "F16"}


class Mlx(OneWidthFormat):
    """MLX affine (mlx-lm), one width of 2, 3, 4, 5, 6 or 8 bits per linear.

    dtype: of scales and biases, and so of what mlx computes; float16 takes symmetric ones alone.
    """

    name: ClassVar[str] = "mlx"
    codec: ClassVar[str] = "bitmill.formats.mlx.codec:MlxCodec"
    legal: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 8)
    config_key: ClassVar[str] = "quantization"
    library: ClassVar[str] = "mlx"
    runtimes: ClassVar[tuple[Runtime, ...]] = (MLX_LM,)

    dtype: Literal["float32", "float16"] = "float32"

    @classmethod
    def recognizes(cls, settings: Mapping[str, Any]) -> bool:
        """By the mode of its quantization."""
        found = settings.get(cls.config_key)
        return isinstance(found, dict) and found.get("mode") == "affine"

    def refusals(self, facts: Facts) -> list[Refusal]:
        """Other architectures, settings that mlx-lm does not read, columns that are no multiples of
        32, and zero points in fp16, beside what all formats of one width refuse."""
        found = super().refusals(facts)
        if self.dtype == "float16" and not self.symmetric:
            found.append(Refusal("symmetric", "float16 cannot hold all biases: set symmetric true"))
        kind = facts.plan.model_type
        if kind not in KNOWN:
            found.append(
                Refusal(kind, f"models of this type are not written, only {', '.join(KNOWN)}")
            )
        for linear in facts.plan.linears:
            if group_size(linear.columns) not in SIZES:
                found.append(
                    Refusal(
                        linear.name,
                        f"its {linear.columns} columns are no multiple of {min(SIZES)}",
                    )
                )
                break
        return found + [Refusal("config.json", why) for why in not_granted(facts.config, "mlx-lm")]

    def kept_tensor(self, plan: Plan, tensor: TensorInfo) -> TensorInfo:
        """Gemma's embedding in fp32 with the scales: mlx-lm keeps all activations in its dtype."""
        half = tensor.dtype in ("F16", "BF16") and self.dtype == "float32"
        if half and plan.model_type.startswith("gemma") and len(tensor.shape) == 2:
            return replace(tensor, dtype="F32")
        return tensor

    def linear_tensors(self, name: str, linear: PlannedLinear, bits: int) -> list[TensorInfo]:
        """Three."""
        N, K = linear.rows, linear.columns
        grid, dtype = (N, K // group_size(K)), _STORED[self.dtype]
        return [
            TensorInfo(f"{name}.weight", "U32", (N, K * bits // 32)),
            TensorInfo(f"{name}.scales", dtype, grid),
            TensorInfo(f"{name}.biases", dtype, grid),
        ]
