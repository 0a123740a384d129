"""Safe reading of GGUF headers: settings, and where each tensor lies. Torch-free.

A GGUF file (versions 2 and 3, little-endian) is the magic "GGUF", u32 version, u64 tensor count,
u64 setting count, the settings (string key, u32 type, value) and per tensor a string name, u32
rank, u64 sizes (innermost first), u32 type, u64 offset from the data's start, which is the header's
end rounded up to `general.alignment` (32). The `gguf` package parses every value into numpy views,
which takes seconds and trusts all counts; a plan needs few settings and must survive strangers'
files, so this reader bounds every count and skips what it does not need.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bitmill.errors import ModelError
from bitmill.io.safetensors import MAX_NAME, MAX_TENSORS, NAME

_MAX_SETTINGS = 10_000
_MAX_ELEMENTS = 3 << 20
"""Of all arrays of a header: a large vocabulary, its scores, types and merges have a million."""
_MAX_STRING = 1 << 24
_MAX_RANK = 4
_LENGTH = struct.Struct("<Q")
"""Of a string, before it."""
_PIECE = 1 << 20
_KEPT_ARRAY = 4096
"""Arrays of numbers up to this length are kept; of longer ones and of strings, the length alone,
unless somebody asks for them."""

_SCALARS: Mapping[int, str] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9

F32 = 0
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""Type of a tensor -> name, weights of a block, bytes of a block: those that can be dequantized."""


@dataclass(frozen=True)
class Skipped:
    """An array that was not read: its length."""

    length: int


@dataclass(frozen=True)
class GgufTensor:
    """shape: outermost axis first; kind: a key of `TYPES`; begin, nbytes: place in the file."""

    shape: tuple[int, ...]
    kind: int
    begin: int
    nbytes: int


class TruncatedGguf(ModelError):
    """The file ends before its header does."""

    code = "bad_gguf"


@dataclass(frozen=True)
class GgufHeader:
    """settings: scalars, strings, lists of numbers or those asked for, `Skipped` arrays."""

    path: Path
    settings: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def check_extent(self) -> None:
        """Raise `ModelError` where a tensor's bytes lie past the file's end, or in another's."""
        size, end = self.path.stat().st_size, 0
        for name, tensor in sorted(self.tensors.items(), key=lambda item: item[1].begin):
            if tensor.begin + tensor.nbytes > size:
                raise _unsound(self.path, f"it is truncated: {name[:100]} lies past {size} bytes")
            if tensor.begin < end and tensor.nbytes:
                raise _unsound(self.path, f"{name[:100]} overlaps the tensor before it")
            end = tensor.begin + tensor.nbytes

    def floats(self, name: str) -> list[float]:
        """The values of a small tensor that is stored as F32; raises `ModelError` for another."""
        tensor = self.tensors[name]
        if tensor.kind != F32 or tensor.nbytes > 4 * _KEPT_ARRAY:
            raise _unsound(self.path, f"{name} is no small tensor of 32-bit floats")
        values = np.fromfile(self.path, "<f4", tensor.nbytes // 4, offset=tensor.begin)
        return [float(value) for value in values]


def _unsound(path: Path, problem: str, kind: type[ModelError] = ModelError) -> ModelError:
    return kind(
        f"{path.name} is not a sound GGUF file: {problem}; fetch the file again",
        code="bad_gguf",
        param=path.name,
    )


class _Cursor:
    """Reads values in order and refuses to run past limits."""

    def __init__(self, handle: BinaryIO, path: Path) -> None:
        self._handle, self._path = handle, path
        self.size = path.stat().st_size
        self._elements = _MAX_ELEMENTS

    def refuse(self, problem: str) -> ModelError:
        return _unsound(self._path, problem)

    def truncated(self) -> ModelError:
        return _unsound(self._path, f"it is truncated at {self.size} bytes", TruncatedGguf)

    def too_many(self, what: str, value: int, limit: int) -> ModelError:
        return self.refuse(f"{what} is {value}, the limit is {limit}")

    @property
    def position(self) -> int:
        return self._handle.tell()

    def take(self, count: int) -> bytes:
        data = self._handle.read(count)
        if len(data) < count:
            raise self.truncated()
        return data

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, what: str, limit: int) -> int:
        value: int = self.scalar("<Q")
        if value > limit:
            raise self.too_many(what, value, limit)
        return value

    def string(self, limit: int) -> str:
        return self.take(self.count("a string's length", limit)).decode("utf-8", "replace")

    def name(self) -> str:
        found = self.string(MAX_NAME)
        if not NAME.fullmatch(found):
            raise self.refuse(f"the name {found[:100]!r} has odd characters")
        return found

    def value(self, kind: int, *, whole: bool) -> Any:
        """A scalar, a string, or an array as a list or, unless wanted whole, `Skipped`."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string(_MAX_STRING)
        if kind == _ARRAY:
            return self.array(whole=whole)
        raise self.refuse(f"a setting has the type {kind}")

    def array(self, *, whole: bool) -> list[Any] | Skipped:
        inner = self.scalar("<I")
        length: int = self.scalar("<Q")
        self._elements -= length
        if self._elements < 0:
            raise self.refuse(f"its arrays have more than {_MAX_ELEMENTS:,} elements")
        if inner in _SCALARS:
            form = np.dtype(_SCALARS[inner])
            data = self.take(length * form.itemsize)
            if not whole and length > _KEPT_ARRAY:
                return Skipped(length)
            kept: list[Any] = np.frombuffer(data, form).tolist()
            return kept
        if inner != _STRING:
            raise self.refuse(f"an array's elements have the type {inner}")
        if whole:
            return [self.string(_MAX_STRING) for _ in range(length)]
        self.skip_strings(length)
        return Skipped(length)

    def skip_strings(self, count: int) -> None:
        """Go past so many strings, by their lengths alone.

        Vocabularies have a million short ones, so the file is read by the megabyte.
        """
        data, place = b"", 0
        for _ in range(count):
            if place + _LENGTH.size > len(data):
                self._handle.seek(place - len(data), os.SEEK_CUR)
                data, place = self._handle.read(_PIECE), 0
                if len(data) < _LENGTH.size:
                    raise self.truncated()
            (length,) = _LENGTH.unpack_from(data, place)
            if length > _MAX_STRING:
                raise self.too_many("a string's length", length, _MAX_STRING)
            place += _LENGTH.size + length
        self._handle.seek(place - len(data), os.SEEK_CUR)
        if self.position > self.size:
            raise self.truncated()

    def tensor(self, name: str) -> GgufTensor:
        """A tensor whose `begin` counts from the data's start."""
        rank = self.scalar("<I")
        if rank > _MAX_RANK:
            raise self.refuse(f"{name} has {rank} axes, the limit is {_MAX_RANK}")
        shape = tuple(reversed([self.count("a tensor's size", 1 << 32) for _ in range(rank)]))
        kind, begin = self.scalar("<I"), self.scalar("<Q")
        if kind not in TYPES:
            raise ModelError(
                f"{self._path.name}: {name[:100]} has the type {kind}; readable are "
                f"{', '.join(name for name, _, _ in TYPES.values())}",
                code="unsupported_dtype",
                param=name[:100],
            )
        _, block, block_bytes = TYPES[kind]
        if (shape[-1] if shape else 1) % block:
            raise self.refuse(f"{name} has rows of {shape[-1]} weights, no multiple of {block}")
        return GgufTensor(shape, kind, begin, math.prod(shape) // block * block_bytes)


def read_gguf_header(path: Path, whole: Collection[str] = ()) -> GgufHeader:
    """Settings and tensors of a GGUF file; `ModelError` (bad_gguf) names a defect.

    whole: keys of arrays that are kept whatever their length.
    Reads the header alone: `GgufHeader.check_extent` looks whether its tensors are there.
    """
    if not path.is_file():
        raise ModelError(f"there is no file {path.name}", code="missing_file", param=path.name)
    with path.open("rb") as handle:
        cursor = _Cursor(handle, path)
        if cursor.take(4) != b"GGUF":
            raise cursor.refuse("it does not begin with GGUF")
        version = cursor.scalar("<I")
        if version not in (2, 3):
            raise cursor.refuse(f"its version is {version}, readable are 2 and 3")
        tensor_count = cursor.count("the number of tensors", MAX_TENSORS)
        setting_count = cursor.count("the number of settings", _MAX_SETTINGS)
        settings: dict[str, Any] = {}
        for _ in range(setting_count):
            key = cursor.name()
            if key in settings:
                raise cursor.refuse(f"the setting {key} appears twice")
            settings[key] = cursor.value(cursor.scalar("<I"), whole=key in whole)
        tensors: dict[str, GgufTensor] = {}
        for _ in range(tensor_count):
            name = cursor.name()
            if name in tensors:
                raise cursor.refuse(f"tensor {name[:100]} appears twice")
            tensors[name] = cursor.tensor(name)
        start = _data_start(cursor, settings)
    placed = {
        name: GgufTensor(tensor.shape, tensor.kind, start + tensor.begin, tensor.nbytes)
        for name, tensor in tensors.items()
    }
    return GgufHeader(path, settings, placed)


def _data_start(cursor: _Cursor, settings: Mapping[str, Any]) -> int:
    alignment = settings.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise cursor.refuse(f"its alignment is {alignment}")
    return -(-cursor.position // alignment) * alignment
