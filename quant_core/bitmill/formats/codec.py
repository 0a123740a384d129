"""What writes a format's files and reads them back.

A codec asks for one linear after another and keeps none, so a model that no memory holds can be
written; reading goes tensor by tensor too. It is made from the settings of its format
(`formats/format.py`), which have said every tensor before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from bitmill.config.bit_width_map import LinearShape
from bitmill.formats.format import Contents, Format
from bitmill.formats.headers import Headers, kind_of
from bitmill.io.atomic import read_json
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.config_json import CONFIG_FILE
from bitmill.quant.tensors import Stored
from bitmill.registry import load_object


@dataclass(frozen=True)
class Supply:
    """Where a codec takes from what it writes; several threads ask, for each thing once.

    folder: whose tokenizer and licence are taken over. settings: of config.json, of no quantized
    model. linear: a quantized linear by its name, as it is to be stored. other: any other tensor by
    its own.
    """

    folder: Path
    settings: Mapping[str, Any]
    linear: Callable[[str], Stored]
    other: Callable[[str], Tensor]


class Checkpoint(Headers, Protocol):
    """A folder in one format whose headers were read; tensors are read on demand."""

    @property
    def headers(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor by its name."""

    def check_linears(self, shapes: Iterable[LinearShape]) -> None:
        """Raise FormatError naming the first tensor of a linear that does not fit its shape."""

    def tensor(self, name: str) -> Tensor:
        """A stored tensor on the CPU. Raises FormatError where it is missing."""

    def linear(self, shape: LinearShape) -> Stored:
        """A quantized linear, checked in full; for a format that keeps codes."""

    def weight(self, shape: LinearShape) -> Tensor:
        """A linear's dequantized weight f32 [N, K] in the source's columns."""


class Codec(Protocol):
    """Writes and opens folders of one format; made from its settings."""

    def write(
        self,
        folder: Path,
        contents: Contents,
        supply: Supply,
        on_linear: Callable[[str], None] = lambda _: None,
    ) -> dict[str, str]:
        """Fill an existing, empty folder; tells each linear that is written, in the plan's order.

        Returns the hex SHA-256 of every stored tensor's bytes by name. Raises FormatError where
        what is supplied is not what the format's `tensors` said, ResourceError for a full disk.
        """

    def open(self, folder: Path) -> Checkpoint:
        """Read what is needed to find tensors. Raises FormatError for another format's folder."""

    def kept(self, weight: Tensor) -> Tensor:
        """What the format keeps of a dequantized weight f32 [N, K]: itself, bit for bit, or what
        its own dtype holds of it."""


def codec_of(chosen: Format) -> Codec:
    """The codec of a format."""
    codec: Codec = load_object(chosen.codec)(chosen)
    return codec


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder in any format that keeps codes, told by its config.json.

    Raises FormatError for a folder in none of them, ModelError for files that are missing or
    damaged.
    """
    return codec_of(kind_of(read_json(folder / CONFIG_FILE))()).open(folder)
