"""Safe reading of safetensors headers: names, dtypes and shapes, not a single weight. Torch-free.

A safetensors file is an 8-byte little-endian header length, a JSON header
{name: {"dtype", "shape", "data_offsets": [begin, end]}} and the tensors' bytes, which must cover
the rest of the file without gap or overlap. Files come from strangers, so everything is bounded and
checked here before any other reader opens them; the `safetensors` library itself accepts duplicate
names and headers of 100 MB.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmill.errors import ModelError
from bitmill.io.safetensors_layout import INDEX_NAME

MAX_HEADER = 16 << 20
MAX_TENSORS = 200_000
MAX_RANK = 8
MAX_NAME = 512
SINGLE_FILE = "model.safetensors"

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of an element of each accepted dtype."""

_NAME = re.compile(r"[\w.\-/]+")
_FILE_NAME = re.compile(r"[\w.\-]+\.safetensors")


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor: `dtype` in safetensors' spelling, `begin` from the data's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    file: str

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"name {twice[:100]!r} appears twice")
    return result


def _refuse(path: Path, problem: str, code: str = "bad_safetensors") -> ModelError:
    return ModelError(
        f"{path.name} is not a sound safetensors file: {problem}; fetch the file again",
        code=code,
        param=path.name,
    )


def _read_json(path: Path) -> tuple[dict[str, Any], int]:
    """The decoded header and the number of data bytes behind it."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        prefix = handle.read(8)
        if len(prefix) < 8:
            raise _refuse(path, f"it is truncated: {size} bytes, a header needs at least 8")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER:
            raise _refuse(path, f"its header claims {length} bytes, the limit is {MAX_HEADER}")
        if 8 + length > size:
            raise _refuse(path, f"it is truncated: the header needs {8 + length} bytes, has {size}")
        text = handle.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _refuse(path, f"its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise _refuse(path, f"its header is a {type(header).__name__}, not an object")
    return header, size - 8 - length


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _parse_tensor(path: Path, name: str, entry: object) -> tuple[TensorHeader, int]:
    """One header entry and its end offset."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise _refuse(path, f"tensor name {name[:100]!r} is too long or has odd characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refuse(path, f"{name} has not exactly the keys dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _refuse(
            path,
            f"{name} has dtype {str(dtype)[:20]}; accepted are {', '.join(DTYPE_BYTES)}",
            code="unsupported_dtype",
        )
    if not _is_counts(shape) or len(shape) > MAX_RANK:
        raise _refuse(path, f"{name} has the shape {str(shape)[:80]}")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise _refuse(path, f"{name} has the offsets {str(offsets)[:80]}")
    tensor = TensorHeader(name, dtype, tuple(shape), offsets[0], path.name)
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise _refuse(path, f"{name} spans {offsets[1] - offsets[0]} bytes, needs {tensor.nbytes}")
    return tensor, offsets[1]


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Tensors of one safetensors file, in the order of their bytes.

    Raises `ModelError` naming the file for a header that is truncated, over 16 MB, over 200,000
    tensors, not JSON, with a name twice, an unknown dtype, or offsets that overlap or leave gaps.
    """
    header, data_bytes = _read_json(path)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise _refuse(path, f"it names {len(header)} tensors, the limit is {MAX_TENSORS}")
    parsed = [_parse_tensor(path, name, entry) for name, entry in header.items()]
    parsed.sort(key=lambda item: (item[0].begin, item[1]))
    position = 0
    for tensor, end in parsed:
        if tensor.begin != position:
            kind = "overlaps the tensor before it" if tensor.begin < position else "leaves a gap"
            raise _refuse(path, f"{tensor.name} begins at {tensor.begin} and {kind} ({position})")
        position = end
    if position != data_bytes:
        raise _refuse(path, f"tensors take {position} bytes, the file has {data_bytes}")
    return {tensor.name: tensor for tensor, _ in parsed}


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name of a sharded checkpoint's index."""
    path = folder / INDEX_NAME
    if path.stat().st_size > 2 * MAX_HEADER:
        raise _refuse(path, f"the index has {path.stat().st_size} bytes")
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
        weight_map = index["weight_map"]
        entries = dict(weight_map.items())
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise _refuse(path, f"it has no readable weight_map ({error})") from error
    for name, file in entries.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise _refuse(path, f"it puts {name[:100]} into {str(file)[:100]!r}, not a plain name")
    return entries


def safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: those of its index, or the single file."""
    if (folder / INDEX_NAME).is_file():
        files = [folder / name for name in sorted(set(_read_index(folder).values()))]
    elif (folder / SINGLE_FILE).is_file():
        files = [folder / SINGLE_FILE]
    else:
        files = sorted(folder.glob("*.safetensors"))
    for path in files:
        if not path.is_file():
            raise ModelError(
                f"{INDEX_NAME} names {path.name}, which is missing; fetch the model again",
                code="missing_file",
                param=path.name,
            )
    return files


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """All tensors of a checkpoint folder, name -> header; raises `ModelError` as `read_header`.

    An index must name every tensor of its files and no other.
    """
    tensors: dict[str, TensorHeader] = {}
    for path in safetensors_files(folder):
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise _refuse(path, f"{name} is also in {tensors[name].file}")
            tensors[name] = tensor
    if (folder / INDEX_NAME).is_file():
        for name, file in _read_index(folder).items():
            if name not in tensors or tensors[name].file != file:
                raise _refuse(folder / INDEX_NAME, f"it puts {name} into {file}, which has it not")
    return tensors
