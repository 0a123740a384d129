"""Writing and reading pack-quantized folders (`formats/compressed_tensors/format.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.config.bit_width_map import LinearShape
from bitmill.formats.codec import Supply
from bitmill.formats.compressed_tensors.format import QUANT_METHOD, CompressedTensors
from bitmill.formats.export_folder import ExportFolder
from bitmill.formats.format import Contents
from bitmill.formats.one_width import group_size, stored_as
from bitmill.formats.one_width_codes import OneWidth, from_words, to_words
from bitmill.formats.writing import copy_companions, write_settings, write_tensors
from bitmill.io.atomic import disk_errors, read_json
from bitmill.io.safetensors import read_headers

PACKING = "pack-quantized"


class CompressedTensorsCodec:
    """See `formats/codec.py`."""

    def __init__(self, settings: CompressedTensors) -> None:
        self._settings = settings

    def write(
        self,
        folder: Path,
        contents: Contents,
        supply: Supply,
        on_linear: Callable[[str], None] = lambda _: None,
    ) -> dict[str, str]:
        """See `formats/codec.py`."""
        bits = self._settings.bits(contents)

        def linear(name: str) -> dict[str, Tensor]:
            size = group_size(contents.plan.by_name[name].columns)
            found, b = OneWidth.of(name, supply.linear(name), size), bits[name]
            symmetric = self._settings.symmetric
            name = stored_as(contents.plan.model_type, name)
            tensors = {
                f"{name}.weight_packed": to_words(found.signed(b) if symmetric else found.codes, b),
                f"{name}.weight_scale": found.scales.T.contiguous(),
                f"{name}.weight_shape": torch.tensor(found.codes.shape),
            }
            if not symmetric:
                tensors[f"{name}.weight_zero_point"] = to_words(found.zeros, b).T.contiguous()
            return tensors

        tensors = self._settings.tensors(contents)
        digests = write_tensors(folder, tensors, bits, linear, supply.other, on_linear=on_linear)
        with disk_errors(folder):
            copy_companions(supply.folder, folder)
        own = {"quantization_config": self._config(contents, bits)}
        write_settings(folder, dict(supply.settings) | own)
        return digests

    def open(self, folder: Path) -> CompressedTensorsFolder:
        """See `formats/codec.py`."""
        settings = read_json(folder / "config.json")
        return CompressedTensorsFolder(folder, read_headers(folder), self._settings, settings)

    def kept(self, weight: Tensor) -> Tensor:
        """Itself."""
        return weight

    def _config(self, contents: Contents, bits: dict[str, int]) -> dict[str, Any]:
        plan = contents.plan
        groups: dict[tuple[int, int], list[str]] = {}
        for linear in plan.linears:
            key = bits[linear.name], group_size(linear.columns)
            groups.setdefault(key, []).append(stored_as(plan.model_type, linear.name))
        return {
            "quant_method": QUANT_METHOD,
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


@dataclass(frozen=True)
class CompressedTensorsFolder(ExportFolder):
    """A pack-quantized folder; settings: its config.json."""

    format: CompressedTensors
    settings: dict[str, Any]

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
