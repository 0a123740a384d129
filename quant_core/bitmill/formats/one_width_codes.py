"""Codes of one width for a whole linear, and integers as streams of bits in 32-bit words.

    value i of a row lies in bits i*b to i*b + b - 1 of the row's stream, which runs through little-
    endian words from their lowest bit on; values may lie in two words

So do compressed-tensors since 0.18 and GPTQ at 2, 3, 4 and 8 bits (along their own dimensions).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bitmill.config.bit_width_map import GROUP_SIZE
from bitmill.errors import FormatError
from bitmill.formats.codec import Supply
from bitmill.formats.export_folder import ExportFolder
from bitmill.formats.format import Contents
from bitmill.formats.one_width import OneWidthFormat, group_size, stored_as
from bitmill.formats.writing import (
    CONFIG_NAME,
    DTYPES,
    write_model,
)
from bitmill.io.atomic import read_json
from bitmill.io.safetensors import read_headers
from bitmill.quant.tensors import QuantizedWeight, Stored, affine

_ROWS = 1024
"""Rows whose bits are spread out in memory at once."""


@dataclass(frozen=True, eq=False)
class OneWidth:
    """codes u8 [N, K] and, per group of `size` columns, scales f16 and zeros u8 [K / size, N]:
    w = scale * (code - zero)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    size: int

    @classmethod
    def of(cls, name: str, stored: Stored, size: int) -> OneWidth:
        """A linear of any widths, without rewrites; exact.

        Raises FormatError where fp16 cannot hold an eighth of a scale of width 1.
        """
        weight = affine({name: stored.unpack()})[name]
        if weight.rewrites:
            raise FormatError(f"{name} has rewrites, which have no place here", param=name)
        codes, scales = _in_integers(name, weight)
        repeat = torch.arange(codes.shape[1] // size) * size // GROUP_SIZE
        return cls(codes, scales[repeat], weight.zeros[repeat], size)

    def signed(self, bits: int) -> Tensor:
        """code - zero + 2^(bits-1), u8 [N, K]: codes of a grid whose zero point is always there."""
        zeros = self.zeros.T.short().repeat_interleave(self.size, 1)
        return (self.codes.short() - zeros + (1 << (bits - 1))).to(torch.uint8)

    def dequantize(self) -> Tensor:
        """f32 [N, K]."""
        scales, zeros = (
            grid.T.float().repeat_interleave(self.size, 1) for grid in (self.scales, self.zeros)
        )
        return scales * (self.codes.float() - zeros)


@dataclass(frozen=True)
class OneWidthFolder(ExportFolder):
    """A safetensors folder in a format of one width; settings: its config.json."""

    format: OneWidthFormat
    settings: dict[str, Any]


class OneWidthCodec:
    """Base of the codecs (`formats/codec.py`) of safetensors formats with one width per linear."""

    folder: ClassVar[type[OneWidthFolder]]

    def __init__(self, settings: OneWidthFormat) -> None:
        self._settings = settings

    def tensors(self, name: str, linear: OneWidth, bits: int) -> dict[str, Tensor]:
        """What `OneWidthFormat.linear_tensors` said, filled."""
        raise NotImplementedError

    def config(self, contents: Contents, bits: dict[str, int]) -> dict[str, Any]:
        """What config.json says of linears, under the format's `config_key`; bits: of each."""
        raise NotImplementedError

    def settings(self, contents: Contents) -> dict[str, Any]:
        """The keys that config.json gets beside those of the model."""
        bits = self._settings.bits(contents)
        return {self._settings.config_key: self.config(contents, bits)}

    def write(
        self,
        folder: Path,
        contents: Contents,
        supply: Supply,
        on_linear: Callable[[str], None] = lambda _: None,
    ) -> dict[str, str]:
        """See `formats/codec.py`."""
        plan, bits = contents.plan, self._settings.bits(contents)

        def linear(name: str) -> dict[str, Tensor]:
            found = OneWidth.of(name, supply.linear(name), group_size(plan.by_name[name].columns))
            return self.tensors(stored_as(plan.model_type, name), found, bits[name])

        tensors = self._settings.tensors(contents)
        dtypes = {tensor.name: DTYPES[tensor.dtype] for tensor in tensors}

        def other(name: str) -> Tensor:
            return supply.other(name).to(dtypes[name])

        return write_model(
            folder,
            tensors,
            bits,
            linear,
            other,
            source=supply.folder,
            settings=dict(supply.settings) | self.settings(contents),
            on_linear=on_linear,
        )

    def open(self, folder: Path) -> OneWidthFolder:
        """See `formats/codec.py`."""
        settings = read_json(folder / CONFIG_NAME)
        return self.folder(folder, read_headers(folder), self._settings, settings)

    def kept(self, weight: Tensor) -> Tensor:
        """Itself."""
        return weight


def _in_integers(name: str, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Codes and scales with which all zero points are whole numbers."""
    ones = [group for group, width in enumerate(weight.widths) if width == 1]
    codes, scales = weight.codes, weight.scales
    if ones:
        codes, scales = codes.clone(), scales.clone()
    for group in ones:
        columns = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
        eighth = weight.scales[group].float() / 8
        codes[:, columns] *= 8
        scales[group] = eighth.half()
        if not torch.equal(scales[group].float(), eighth):
            raise FormatError(
                f"{name} has 1-bit groups whose scales are too small for an integer zero point in "
                "fp16: quantize with allocation.min_bits 2",
                code="scale_too_small",
                param=name,
            )
    return codes, scales


def to_words(values: Tensor, bits: int) -> Tensor:
    """i32 [R, ceil(C * bits / 32)] of u8 [R, C], each below 2^bits."""
    rows, columns = values.shape
    words = -(-columns * bits // 32)
    found = np.zeros((rows, 4 * words), np.uint8)
    for start in range(0, rows, _ROWS):
        part = values[start : start + _ROWS].contiguous().numpy()
        spread = np.unpackbits(part[..., None], axis=-1, count=bits, bitorder="little")
        packed = np.packbits(spread.reshape(len(part), -1), axis=-1, bitorder="little")
        found[start : start + len(part), : packed.shape[1]] = packed
    return torch.from_numpy(found.view("<i4"))


def from_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """What `to_words` packed: u8 [R, C]."""
    found = np.empty((len(words), columns), np.uint8)
    for start in range(0, len(words), _ROWS):
        part = words[start : start + _ROWS].contiguous().numpy().view(np.uint8)
        spread = np.unpackbits(part, axis=-1, count=columns * bits, bitorder="little")
        spread = spread.reshape(len(part), columns, bits)
        found[start : start + len(part)] = np.packbits(spread, axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy(found)
