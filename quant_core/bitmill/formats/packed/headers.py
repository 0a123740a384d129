"""A packed folder without its tensors: config.json, the map and the headers. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.errors import FormatError
from bitmill.formats.headers import HeaderFolder
from bitmill.formats.packed.config import QUANT_METHOD, PackedConfig
from bitmill.formats.packed.format import Packed, PackedTrellis
from bitmill.io.atomic import read_json
from bitmill.io.safetensors import TensorInfo, read_headers
from bitmill.plan.config_json import CONFIG_FILE


@dataclass(frozen=True)
class PackedHeaders(HeaderFolder):
    """A packed folder whose config and headers were read."""

    config: PackedConfig

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read config.json and the safetensors headers.

        Raises FormatError for a config that is not of a packed model, ModelError for safetensors
        files that are missing or damaged.
        """
        settings = read_json(folder / CONFIG_FILE)
        quantization = settings.get("quantization_config") if isinstance(settings, dict) else None
        if not isinstance(quantization, dict):
            raise FormatError(
                f"{folder.name} is not a packed model: {CONFIG_FILE} has no quantization_config",
                param=CONFIG_FILE,
            )
        method = quantization.get("quant_method")
        if method != QUANT_METHOD:
            raise FormatError(
                f"{folder.name} is not a packed model: its quant_method is {method!r}, as of an "
                "export or of another tool; give the folder that was packed",
                param="quantization_config.quant_method",
            )
        config = PackedConfig.from_dict(quantization)
        return cls(folder, read_headers(folder), config)

    @property
    def format(self) -> Packed:
        """Its format."""
        return PackedTrellis() if self.config.code == "trellis" else Packed()

    @property
    def bit_widths(self) -> BitWidthMap:
        """The map's file. Raises FormatError unless it gives what config.json does."""
        found = BitWidthMap.load(self.folder / MAP_NAME)
        if self.config.widths != found.linears:
            raise FormatError(f"{MAP_NAME} and {CONFIG_FILE} give different widths", param=MAP_NAME)
        if self.config.outliers != found.outliers:
            raise FormatError(
                f"{MAP_NAME} and {CONFIG_FILE} give different numbers of outliers", param=MAP_NAME
            )
        return found

    @property
    def kinds(self) -> frozenset[str]:
        """Of the quantized tensors."""
        return frozenset({self.config.code})

    @property
    def rewrites(self) -> frozenset[str]:
        """Names of those that are stored."""
        stored = {"order"} if any(self.config.orders.values()) else set()
        stored |= {"outliers"} if self.config.outliers else set()
        return frozenset(stored | ({"rotation"} if self.config.code == "trellis" else set()))

    @property
    def kept(self) -> list[TensorInfo]:
        """What was not quantized."""
        return self.others(self.config.linears)
