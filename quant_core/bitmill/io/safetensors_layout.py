"""Which bytes a set of tensors takes as safetensors files, computed from names and shapes alone.

A file is 8 bytes of header length, the header (compact JSON padded with spaces to a multiple of 8)
and the tensors, sorted by descending dtype rank, then by name, as the `safetensors` library writes
them. Shards are filled in the order given, so the layout depends on nothing but the arguments.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from json.encoder import encode_basestring

from bitmill.errors import InputError

METADATA = {"format": "pt"}
MAX_SHARD_BYTES = 2_000_000_000
INDEX_NAME = "model.safetensors.index.json"

# Bytes per element, in the library's `Dtype` order: a later one is written first.
_DTYPES = {
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
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES)}


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype ("F16", "U8", ...) and shape of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def bytes(self) -> int:
        """Size of the data."""
        return _DTYPES[self.dtype] * math.prod(self.shape)

    @cached_property
    def entry_bytes(self) -> int:
        """Length of its entry in a header, its comma included, the digits of offsets not."""
        shape = ",".join(map(str, self.shape))
        text = f':{{"dtype":"{self.dtype}","shape":[{shape}],"data_offsets":[,]}},'
        return len(encode_basestring(self.name).encode()) + len(text)

    def _entry(self, offset: int) -> dict[str, object]:
        shape = list(self.shape)
        offsets = [offset, offset + self.bytes]
        return {"dtype": self.dtype, "shape": shape, "data_offsets": offsets}


def shard(
    tensors: Sequence[TensorSpec], max_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[TensorSpec]]:
    """File name -> tensors: one `model.safetensors`, or numbered shards of at most `max_bytes`.

    The limit counts tensor data; a single larger tensor gets a shard of its own.
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": part for i, part in enumerate(shards, 1)}


def header(tensors: Iterable[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """First bytes of a file, the 8 bytes of the header's length included, and the place of each
    tensor's data in the file."""
    entries: dict[str, object] = {"__metadata__": METADATA}
    offsets: dict[str, int] = {}
    offset = 0
    for tensor in sorted(tensors, key=_place):
        offsets[tensor.name] = offset
        entries[tensor.name] = tensor._entry(offset)
        offset += tensor.bytes
    text = _compact(entries)
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: len(first) + start for name, start in offsets.items()}


def header_bytes(tensors: Iterable[TensorSpec]) -> int:
    """`len(header(tensors)[0])`, counted without writing it."""
    length = len(_compact({"__metadata__": METADATA}))
    offset = 0
    for tensor in sorted(tensors, key=_place):
        length += tensor.entry_bytes + len(str(offset)) + len(str(offset + tensor.bytes))
        offset += tensor.bytes
    return 8 + length + -length % 8


def _place(tensor: TensorSpec) -> tuple[int, str]:
    """Sort key of a tensor's place in a file."""
    return -_RANK[tensor.dtype], tensor.name


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def checkpoint_bytes(tensors: Sequence[TensorSpec], max_bytes: int = MAX_SHARD_BYTES) -> int:
    """Bytes of all safetensors files that hold these tensors, headers included.

    Raises `InputError` for a name that stands twice.
    """
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"tensor {twice!r} stands twice; every stored tensor needs its own name")
    return sum(
        header_bytes(part) + sum(t.bytes for t in part)
        for part in shard(tensors, max_bytes).values()
    )
