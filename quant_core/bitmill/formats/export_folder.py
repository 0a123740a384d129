"""A folder in a format that keeps no codes: what `Checkpoint` asks of it beyond its weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bitmill.config.bit_width_map import BitWidthMap, LinearShape
from bitmill.errors import FormatError
from bitmill.formats.reading import TensorFolder
from bitmill.io.safetensors import TensorInfo
from bitmill.quant.tensors import Stored


@dataclass(frozen=True)
class ExportFolder(TensorFolder):
    """Has weights, and neither codes nor a map."""

    @property
    def kinds(self) -> frozenset[str]:
        """None."""
        return frozenset()

    @property
    def rewrites(self) -> frozenset[str]:
        """None."""
        return frozenset()

    @property
    def kept(self) -> list[TensorInfo]:
        """Everything."""
        return list(self.headers.values())

    @property
    def bit_widths(self) -> BitWidthMap:
        """Raises FormatError."""
        raise self._no_codes()

    def linear(self, shape: LinearShape) -> Stored:
        """Raises FormatError."""
        raise self._no_codes()

    def check_linears(self, shapes: Iterable[LinearShape]) -> None:
        """Raises FormatError."""
        raise self._no_codes()

    def _no_codes(self) -> FormatError:
        return FormatError(f"{self.folder.name} is an export, which keeps no codes", param="format")
