"""Writing and reading plain safetensors (`formats/dequantized/format.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.config.bit_width_map import LinearShape
from bitmill.errors import FormatError
from bitmill.formats.codec import Supply
from bitmill.formats.dequantized.format import Dequantized
from bitmill.formats.export_folder import ExportFolder
from bitmill.formats.format import Contents
from bitmill.formats.writing import write_model
from bitmill.io.atomic import read_json
from bitmill.io.safetensors import read_headers
from bitmill.plan.architectures import architecture


class DequantizedCodec:
    """See `formats/codec.py`."""

    def __init__(self, settings: Dequantized) -> None:
        self._settings = settings
        self._dtype: torch.dtype = getattr(torch, settings.dtype)

    def write(
        self,
        folder: Path,
        contents: Contents,
        supply: Supply,
        on_linear: Callable[[str], None] = lambda _: None,
    ) -> dict[str, str]:
        """Raises FormatError where a weight is beyond the dtype's range."""
        plan = contents.plan
        found = architecture(plan.model_type)

        def linear(name: str) -> dict[str, Tensor]:
            weight = supply.linear(name).unpack().dequantize().to(self._dtype)
            if found.transposed and plan.by_name[name].block >= 0:
                weight = weight.T
            return {found.stored(f"{name}.weight"): self._finite(name, weight)}

        def other(name: str) -> Tensor:
            tensor = supply.other(name)
            if not tensor.is_floating_point():
                return tensor
            return self._finite(name, tensor.to(self._dtype))

        key = "torch_dtype" if "torch_dtype" in supply.settings else "dtype"
        return write_model(
            folder,
            self._settings.tensors(contents),
            [matrix.name for matrix in plan.matrices],
            linear,
            other,
            source=supply.folder,
            settings=dict(supply.settings) | {key: self._settings.dtype},
            on_linear=on_linear,
        )

    def open(self, folder: Path) -> DequantizedFolder:
        """See `formats/codec.py`."""
        settings = read_json(folder / "config.json")
        return DequantizedFolder(folder, read_headers(folder), self._settings, settings)

    def kept(self, weight: Tensor) -> Tensor:
        """Its values in the dtype."""
        return weight.to(self._dtype).float()

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not bool(torch.isfinite(tensor).all()):
            raise FormatError(
                f"{name} has values that {self._settings.dtype} cannot hold: "
                "export with dtype bfloat16 or float32",
                code="beyond_dtype",
                param=name,
            )
        return tensor


@dataclass(frozen=True)
class DequantizedFolder(ExportFolder):
    """A folder of plain weights. settings: of its config.json."""

    format: Dequantized
    settings: dict[str, Any]

    def weight(self, shape: LinearShape) -> Tensor:
        """A linear's weight f32 [N, K]."""
        found = architecture(self.settings["model_type"])
        weight = self.tensor(found.stored(f"{shape.name}.weight")).float()
        inside = shape.name.startswith(f"{found.blocks}.")
        return weight.T if found.transposed and inside else weight
