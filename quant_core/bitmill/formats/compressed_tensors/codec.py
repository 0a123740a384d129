"""Writing and reading pack-quantized folders (`formats/compressed_tensors/format.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bitmill.config.bit_width_map import LinearShape
from bitmill.formats.format import Contents
from bitmill.formats.one_width import group_size, stored_as
from bitmill.formats.one_width_codes import (
    OneWidth,
    OneWidthCodec,
    OneWidthFolder,
    from_words,
    to_words,
)

PACKING = "pack-quantized"


@dataclass(frozen=True)
class CompressedTensorsFolder(OneWidthFolder):
    """A pack-quantized folder."""

    def weight(self, shape: LinearShape) -> Tensor:
        """A linear's weight f32 [N, K]: scale * (code - zero)."""
        groups = self.settings["quantization_config"]["config_groups"].values()
        name = stored_as(self.settings["model_type"], shape.name)
        scheme = next(group["weights"] for group in groups if name in group["targets"])
        bits, size = scheme["num_bits"], scheme["group_size"]
        N, K = self.tensor(f"{name}.weight_shape").tolist()
        scales = self.tensor(f"{name}.weight_scale").T
        zeros = torch.full_like(scales, 1 << (bits - 1), dtype=torch.uint8)
        if not scheme["symmetric"]:
            zeros = from_words(self.tensor(f"{name}.weight_zero_point").T, bits, N)
        codes = from_words(self.tensor(f"{name}.weight_packed"), bits, K)
        return OneWidth(codes, scales, zeros, size).dequantize()


class CompressedTensorsCodec(OneWidthCodec):
    """See `formats/codec.py`."""

    folder: ClassVar[type[OneWidthFolder]] = CompressedTensorsFolder

    def tensors(self, name: str, linear: OneWidth, bits: int) -> dict[str, Tensor]:
        """Codes and zero points in words."""
        symmetric = self._settings.symmetric
        codes = linear.signed(bits) if symmetric else linear.codes
        found = {
            f"{name}.weight_packed": to_words(codes, bits),
            f"{name}.weight_scale": linear.scales.T.contiguous(),
            f"{name}.weight_shape": torch.tensor(linear.codes.shape),
        }
        if not symmetric:
            found[f"{name}.weight_zero_point"] = to_words(linear.zeros, bits).T.contiguous()
        return found

    def config(self, contents: Contents, bits: dict[str, int]) -> dict[str, Any]:
        """One group of linears for each width and size."""
        plan = contents.plan
        groups: dict[tuple[int, int], list[str]] = {}
        for linear in plan.linears:
            key = bits[linear.name], group_size(linear.columns)
            groups.setdefault(key, []).append(stored_as(plan.model_type, linear.name))
        return {
            "quant_method": self._settings.quant_method,
            "format": PACKING,
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": {
                    "targets": groups[width, size],
                    "weights": {
                        "num_bits": width,
                        "type": "int",
                        "symmetric": self._settings.symmetric,
                        "strategy": "group",
                        "group_size": size,
                    },
                    "format": PACKING,
                }
                for i, (width, size) in enumerate(sorted(groups))
            },
            "ignore": [
                tensor.name.removesuffix(".weight")
                for tensor in plan.tensors
                if len(tensor.shape) == 2 and tensor.name.endswith(".weight")
            ],
        }
