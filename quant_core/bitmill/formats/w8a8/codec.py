"""Writing and reading folders of 8-bit weights and activations (`formats/w8a8/format.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bitmill.config.bit_width_map import LinearShape
from bitmill.formats.codec import Supply
from bitmill.formats.export_folder import ExportFolder
from bitmill.formats.format import Contents
from bitmill.formats.w8a8.format import DTYPES, FORMATS, W8A8
from bitmill.formats.writing import write_model
from bitmill.io.atomic import read_json
from bitmill.io.safetensors import READABLE, read_headers
from bitmill.plan.architectures import architecture

LARGEST = {"int8": 127.0, "fp8": 448.0}


def eight_bits(weight: Tensor, dtype: Literal["int8", "fp8"]) -> tuple[Tensor, Tensor]:
    """Codes i8 or E4M3 [N, K] and scales f32 [N, 1] of a weight f32 [N, K]."""
    scales = weight.abs().amax(1, keepdim=True) / LARGEST[dtype]
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (weight / scales).clamp(-LARGEST[dtype], LARGEST[dtype])
    if dtype == "int8":
        return codes.round().to(torch.int8), scales
    return codes.to(torch.float8_e4m3fn), scales


class W8A8Codec:
    """See `formats/codec.py`."""

    def __init__(self, settings: W8A8) -> None:
        self._settings = settings

    def write(
        self,
        folder: Path,
        contents: Contents,
        supply: Supply,
        on_linear: Callable[[str], None] = lambda _: None,
    ) -> dict[str, str]:
        """See `formats/codec.py`."""
        plan = contents.plan
        stored = architecture(plan.model_type).stored

        def linear(name: str) -> dict[str, Tensor]:
            weight = supply.linear(name).unpack().dequantize()
            codes, scales = eight_bits(weight, self._settings.dtype)
            place = stored(f"{name}.weight")
            return {place: codes, f"{place}_scale": scales}

        return write_model(
            folder,
            self._settings.tensors(contents),
            [linear.name for linear in plan.linears],
            linear,
            supply.other,
            source=supply.folder,
            settings=dict(supply.settings) | {"quantization_config": self._config(contents)},
            on_linear=on_linear,
        )

    def open(self, folder: Path) -> W8A8Folder:
        """See `formats/codec.py`."""
        headers = read_headers(folder, (*READABLE, *DTYPES.values()))
        return W8A8Folder(folder, headers, self._settings, read_json(folder / "config.json"))

    def kept(self, weight: Tensor) -> Tensor:
        """Its values in 8 bits."""
        codes, scales = eight_bits(weight, self._settings.dtype)
        return codes.float() * scales

    def _config(self, contents: Contents) -> dict[str, Any]:
        """Every linear but those that are kept, and the head, which a tied model stores nowhere."""
        kept = [
            tensor.name.removesuffix(".weight")
            for tensor in contents.plan.tensors
            if len(tensor.shape) == 2 and tensor.name.endswith(".weight")
        ]
        kind, layout = self._settings.dtype, FORMATS[self._settings.dtype]
        numbers = {"num_bits": 8, "type": {"int8": "int", "fp8": "float"}[kind], "symmetric": True}
        scheme = {
            "targets": ["Linear"],
            "weights": numbers | {"strategy": "channel", "dynamic": False},
            "input_activations": numbers | {"strategy": "token", "dynamic": True},
            "format": layout,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": layout,
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": list(dict.fromkeys(["lm_head", *kept])),
        }


@dataclass(frozen=True)
class W8A8Folder(ExportFolder):
    """A folder of 8-bit weights. settings: of its config.json."""

    format: W8A8
    settings: dict[str, Any]

    def weight(self, shape: LinearShape) -> Tensor:
        """A linear's weight f32 [N, K]: code * scale."""
        name = architecture(self.settings["model_type"]).stored(f"{shape.name}.weight")
        return self.tensor(name).float() * self.tensor(f"{name}_scale")
