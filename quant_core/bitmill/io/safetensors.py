"""Safetensors files: what they hold, how many bytes they take, and writing them. Torch-free.

A file is 8 bytes of little-endian header length, a JSON header {name: {"dtype", "shape",
"data_offsets": [begin, end]}} padded with spaces to a multiple of 8, and the tensors' bytes, which
cover the rest of the file without gap or overlap.

Reading: files come from strangers, so everything is bounded and checked here before any other
reader opens them; the `safetensors` library itself accepts duplicate names and headers of 100 MB.

Writing: tensors are sorted by descending dtype rank, then by name, as the `safetensors` library
writes them. Shards are filled in the order given. So sizes and places depend on names and shapes
alone, and are known before anything is written.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any, BinaryIO, Self

from bitmill.errors import InputError, ModelError
from bitmill.io import bounded_json
from bitmill.io.atomic import Flusher, write_json
from bitmill.io.bounded_json import shown

METADATA = {"format": "pt"}
MAX_SHARD_BYTES = 2_000_000_000
SINGLE_FILE = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER = 8 << 20
MAX_TENSORS = 50_000
MAX_RANK = 8
MAX_NAME = 512
_MAX_MARKS = 20 * MAX_TENSORS
_MAX_INDEX = 32 << 20
_MAX_INDEXED = 400_000

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
"""Bytes of an element, in the library's `Dtype` order: a later one is written first."""

READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "U32", "I16", "I8", "U8", "BOOL")
"""Dtypes that a file may have, unless it is read as an export that has others."""

_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_BYTES)}
NAME = re.compile(r"[\w.\-/]+")
"""Of a tensor."""
_KEYS = {"dtype", "shape", "data_offsets"}
_FILE_NAME = re.compile(r"[\w.\-]+\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: dtype in safetensors' spelling ("F16", "U8", ...); file where known."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)

    @property
    def entry_bytes(self) -> int:
        """Length of its entry in a header, its comma included, the digits of offsets not."""
        shape = ",".join(map(str, self.shape))
        text = f':{{"dtype":"{self.dtype}","shape":[{shape}],"data_offsets":[,]}},'
        return len(encode_basestring(self.name).encode()) + len(text)

    def _entry(self, offset: int) -> dict[str, object]:
        shape = list(self.shape)
        offsets = [offset, offset + self.nbytes]
        return {"dtype": self.dtype, "shape": shape, "data_offsets": offsets}


def shard(
    tensors: Sequence[TensorInfo], max_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[TensorInfo]]:
    """File name -> tensors: one `model.safetensors`, or numbered shards of at most `max_bytes`.

    The limit counts tensor data; a single larger tensor gets a shard of its own. None holds more
    than the `MAX_TENSORS` that are read again.
    """
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor.nbytes
        full = filled + size > max_bytes or len(shards[-1]) == MAX_TENSORS
        if shards[-1] and full:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": part for i, part in enumerate(shards, 1)}


def header(tensors: Iterable[TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """First bytes of a file, the 8 bytes of the header's length included, and the place of each
    tensor's data in the file."""
    entries: dict[str, object] = {"__metadata__": METADATA}
    offsets: dict[str, int] = {}
    offset = 0
    for tensor in sorted(tensors, key=_place):
        offsets[tensor.name] = offset
        entries[tensor.name] = tensor._entry(offset)
        offset += tensor.nbytes
    text = _compact(entries)
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: len(first) + start for name, start in offsets.items()}


def header_bytes(tensors: Iterable[TensorInfo]) -> int:
    """`len(header(tensors)[0])`, counted without writing it."""
    length = len(_compact({"__metadata__": METADATA}))
    offset = 0
    for tensor in sorted(tensors, key=_place):
        end = offset + tensor.nbytes
        length += tensor.entry_bytes + len(str(offset)) + len(str(end))
        offset = end
    return 8 + length + -length % 8


def _place(tensor: TensorInfo) -> tuple[int, str]:
    """Sort key of a tensor's place in a file."""
    return -_RANK[tensor.dtype], tensor.name


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def checkpoint_bytes(tensors: Sequence[TensorInfo], max_bytes: int = MAX_SHARD_BYTES) -> int:
    """Bytes of all safetensors files that hold these tensors, headers included.

    Raises `InputError` for a name that stands twice.
    """
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"tensor {twice!r} stands twice; every stored tensor needs its own name")
    return sum(
        header_bytes(part) + sum(t.nbytes for t in part)
        for part in shard(tensors, max_bytes).values()
    )


def file_pieces(
    tensors: Iterable[TensorInfo], data: Mapping[str, memoryview]
) -> list[bytes | memoryview]:
    """The pieces of one file, in order: header, then each tensor's bytes, none of them copied."""
    first, places = header(tensors)
    return [first, *(data[name] for name in places)]


class ShardWriter:
    """Safetensors files in an existing folder, whose tensors come in any order, from any thread.

    A context manager: files have their headers inside, and are flushed to disk while they are
    written. A file takes one write at a time, and threads that ask for more keep cores busy with
    waiting, so tensors take turns.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[TensorInfo], max_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._folder = folder
        self._shards = shard(tensors, max_bytes)
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._flusher = Flusher()
        self._writing = threading.Lock()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        for name, part in self._shards.items():
            first, offsets = header(part)
            file = self._open.enter_context((self._folder / name).open("wb"))
            _write_at(file, 0, memoryview(first))
            self._places.update({tensor: (file, offset) for tensor, offset in offsets.items()})
        self._open.enter_context(self._flusher)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def write(self, name: str, data: memoryview) -> None:
        """Put a tensor's bytes in their place."""
        file, offset = self._places[name]
        with self._writing:
            _write_at(file, offset, data)
        self._flusher.wrote(file, len(data))

    def write_index(self, names: Iterable[str]) -> None:
        """Write the index, tensors in the order of `names`; a single file needs none."""
        if len(self._shards) == 1:
            return
        files = {tensor.name: file for file, part in self._shards.items() for tensor in part}
        total = sum(tensor.nbytes for part in self._shards.values() for tensor in part)
        weight_map = {name: files[name] for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self._folder / INDEX_NAME, index)


def _write_at(file: BinaryIO, offset: int, data: memoryview) -> None:
    """Write all of `data`, of which the system takes 2 GiB at once; moves no shared position."""
    while len(data):
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written


def _refuse(path: Path, problem: str, code: str = "bad_safetensors") -> ModelError:
    return ModelError(
        f"{path.name} is not a sound safetensors file: {problem}; fetch the file again",
        code=code,
        param=path.name,
    )


def _read_header_json(path: Path) -> tuple[dict[str, Any], int]:
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
        header = bounded_json.loads(text, _MAX_MARKS)
    except ValueError as error:
        raise _refuse(path, f"its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise _refuse(path, f"its header is a {type(header).__name__}, not an object")
    return header, size - 8 - length


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _parse_tensor(
    path: Path, name: str, entry: object, readable: Collection[str]
) -> tuple[int, int, TensorInfo]:
    """Begin and end of one tensor's data, and the tensor."""
    if len(name) > MAX_NAME or not NAME.fullmatch(name):
        raise _refuse(path, f"tensor name {name[:100]!r} is too long or has odd characters")
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise _refuse(path, f"{name} has not exactly the keys dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in readable:
        raise _refuse(
            path,
            f"{name} has dtype {str(dtype)[:20]}; accepted are {', '.join(readable)}",
            code="unsupported_dtype",
        )
    if not _is_counts(shape) or len(shape) > MAX_RANK:
        raise _refuse(path, f"{name} has the shape {shown(shape, 80)}")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise _refuse(path, f"{name} has the offsets {shown(offsets, 80)}")
    tensor = TensorInfo(name, dtype, tuple(shape), path.name)
    begin, end = offsets
    if end - begin != tensor.nbytes:
        raise _refuse(path, f"{name} spans {end - begin} bytes, needs {tensor.nbytes}")
    return begin, end, tensor


def read_header(path: Path, readable: Collection[str] = READABLE) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file, in the order of their bytes; readable: dtypes it may have.

    Raises `ModelError` naming the file for a header that is truncated, over 8 MiB, over 50,000
    tensors, not JSON, with a name twice, an unknown dtype, or offsets that overlap or leave gaps.
    """
    header, data_bytes = _read_header_json(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _refuse(path, "its __metadata__ is not an object of texts")
    if len(header) > MAX_TENSORS:
        raise _refuse(path, f"it names {len(header)} tensors, the limit is {MAX_TENSORS}")
    parsed = [_parse_tensor(path, name, entry, readable) for name, entry in header.items()]
    parsed.sort(key=lambda item: item[:2])
    position = 0
    for begin, end, tensor in parsed:
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a gap"
            raise _refuse(path, f"{tensor.name} begins at {begin} and {kind} ({position})")
        position = end
    if position != data_bytes:
        raise _refuse(path, f"tensors take {position} bytes, the file has {data_bytes}")
    return {tensor.name: tensor for _, _, tensor in parsed}


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name of a sharded checkpoint's index.

    Raises `ModelError` for one that is damaged or names other than plain safetensors files.
    """
    path = folder / INDEX_NAME
    if path.stat().st_size > _MAX_INDEX:
        raise _refuse(path, f"it has {path.stat().st_size} bytes, the limit is {_MAX_INDEX}")
    try:
        index = bounded_json.loads(path.read_bytes(), _MAX_INDEXED)
        weight_map = index["weight_map"]
        entries = dict(weight_map.items())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _refuse(path, f"it has no readable weight_map ({error})") from error
    if not entries:
        raise _refuse(path, "its weight_map is empty")
    for name, file in entries.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise _refuse(path, f"it puts {name[:100]} into {str(file)[:100]!r}, not a plain name")
    return entries


def safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files that are a folder's model, as transformers decides.

    A single `model.safetensors` comes before an index, which may be left over from an earlier save;
    files that neither is or names are no part of the model. Raises `ModelError` (missing_file).
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_NAME).is_file():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        instead = f" (but {', '.join(others[:3])})" if others else ""
        raise ModelError(
            f"{folder.name} holds neither {SINGLE_FILE} nor {INDEX_NAME}{instead}, which "
            "transformers would look for: fetch the model again, or give the files their names",
            code="missing_file",
            param=SINGLE_FILE,
        )
    files = [folder / name for name in sorted(set(read_index(folder).values()))]
    for path in files:
        if not path.is_file():
            raise ModelError(
                f"{INDEX_NAME} names {path.name}, which is missing; fetch the model again",
                code="missing_file",
                param=path.name,
            )
    return files


def read_headers(folder: Path, readable: Collection[str] = READABLE) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint folder, name -> header; raises `ModelError` as `read_header`.

    Every tensor that an index names must be in the file that it names.
    """
    tensors: dict[str, TensorInfo] = {}
    files = safetensors_files(folder)
    for path in files:
        for name, tensor in read_header(path, readable).items():
            if name in tensors:
                raise _refuse(path, f"{name} is also in {tensors[name].file}")
            tensors[name] = tensor
    if files[0].name != SINGLE_FILE:
        for name, file in read_index(folder).items():
            if name not in tensors or tensors[name].file != file:
                raise _refuse(folder / INDEX_NAME, f"it puts {name} into {file}, which has it not")
    return tensors
