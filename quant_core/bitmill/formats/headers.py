"""The headers of a folder of safetensors files: what they hold, compared with what they should.

Torch-free: an export is planned from headers alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.errors import FormatError
from bitmill.formats.format import FORMATS, Format
from bitmill.io.atomic import read_json
from bitmill.io.safetensors import TensorInfo, safetensors_files
from bitmill.plan.config_json import CONFIG_FILE
from bitmill.registry import load_object


class Headers(Protocol):
    """What a folder in one format says of itself without a tensor being read."""

    @property
    def format(self) -> Format:
        """The format that it is in."""

    @property
    def bit_widths(self) -> BitWidthMap:
        """Widths of all linears. Raises FormatError for a format that keeps no codes."""

    @property
    def kinds(self) -> frozenset[str]:
        """Of the quantized tensors (`quant.tensors.KINDS`)."""

    @property
    def rewrites(self) -> frozenset[str]:
        """Names of the rewrites that some linear stores."""

    @property
    def kept(self) -> list[TensorInfo]:
        """The tensors that were taken over from the source as they are."""

    @property
    def file_bytes(self) -> int:
        """Bytes of all files that hold tensors."""


def kind_of(settings: Any) -> type[Format]:
    """The format that keeps codes and knows this config.json; of none, the first one, which says
    what is wrong."""
    kinds = [FORMATS[name] for name in FORMATS.names()]
    kinds = [kind for kind in kinds if kind.keeps_codes]
    if isinstance(settings, dict):
        kinds.sort(key=lambda kind: not kind.recognizes(settings))
    return kinds[0]


def read_packed_headers(folder: Path) -> Headers | None:
    """The headers of a folder in any format that keeps codes; None where its format reads none
    without torch.

    Raises FormatError for a folder in no such format, ModelError for files that are missing or
    damaged.
    """
    place = kind_of(read_json(folder / CONFIG_FILE)).headers
    if place is None:
        return None
    found: Headers = load_object(place).open(folder)
    return found


@dataclass(frozen=True)
class HeaderFolder:
    """A folder, and the headers of its tensors by name (`io.safetensors.read_headers`)."""

    folder: Path
    headers: dict[str, TensorInfo]

    @cached_property
    def _by_module(self) -> dict[str, list[str]]:
        """Names of the stored tensors of every module."""
        found: dict[str, list[str]] = {}
        for name in self.headers:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    @property
    def file_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(file.stat().st_size for file in safetensors_files(self.folder))

    def check_headers(self, expected: Iterable[TensorInfo]) -> None:
        """Raise FormatError for the first tensor that is missing or of another dtype or shape."""
        for spec in expected:
            found = self.headers.get(spec.name)
            if found is None:
                raise FormatError(
                    f"tensor {spec.name} is missing from the checkpoint", param=spec.name
                )
            if found.dtype != spec.dtype or found.shape != spec.shape:
                raise FormatError(
                    f"tensor {spec.name} is {found.dtype} of shape {found.shape}: "
                    f"the format says {spec.dtype} of shape {spec.shape}",
                    param=spec.name,
                )

    def check_no_others(self, linear: str, expected: set[str]) -> None:
        """Raise FormatError for a tensor of a linear that is neither expected nor its bias."""
        for name in self._by_module.get(linear, ()):
            if name not in expected and name != f"{linear}.bias":
                raise FormatError(f"tensor {name} does not belong to the format", param=name)

    def others(self, linears: Iterable[str]) -> list[TensorInfo]:
        """Tensors that lie under no linear's name, and the linears' biases."""
        known = set(linears)
        return [
            tensor
            for name, tensor in self.headers.items()
            if name.rpartition(".")[0] not in known or name.endswith(".bias")
        ]
