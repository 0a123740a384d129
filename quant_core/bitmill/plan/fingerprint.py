"""What a model is, in one number: of its tensors' names, dtypes and shapes, and of their values.

    shape    SHA-256 over [name, dtype, shape] of every stored tensor, by name
    weights  SHA-256 over {name: SHA-256 of dtype, shape and bytes}, by name

How tensors are divided among files does not count. A model and its fine-tune have one `shape`, so a
bit-width map of one can be applied to the other. Torch-free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Self

from bitmill.config.closed import Closed
from bitmill.io.atomic import sha256_json
from bitmill.io.safetensors import TensorInfo, read_header, read_headers, safetensors_files

_CHUNK = 4 << 20


class Fingerprint(Closed):
    """Hex SHA-256 of shapes, and of weights where all of these were read."""

    shape: str
    weights: str | None = None

    @classmethod
    def of(
        cls, headers: Mapping[str, TensorInfo], digests: Mapping[str, str] | None = None
    ) -> Self:
        """Of a folder's headers; digests: of its tensors, as `hash_weights` gives them."""
        told = [[one.name, one.dtype, list(one.shape)] for _, one in sorted(headers.items())]
        weights = None if digests is None else sha256_json(dict(digests))
        return cls(shape=sha256_json(told), weights=weights)

    @classmethod
    def of_folder(cls, folder: Path, *, weights: bool = False) -> Self:
        """Of a folder of safetensors; weights: read all of them. Raises `ModelError`."""
        digests: dict[str, str] = {}
        for path in safetensors_files(folder) if weights else ():
            digests |= hash_weights(path)[1]
        return cls.of(read_headers(folder), digests if weights else None)


def hash_weights(path: Path) -> tuple[str, dict[str, str]]:
    """Hex SHA-256 of a safetensors file, and of every tensor in it with its dtype and shape.

    The file is read once; a second thread hashes the tensors beside it.
    """
    tensors = read_header(path)
    whole, digests = hashlib.sha256(), {}
    with path.open("rb") as file, ThreadPoolExecutor(1) as beside:
        length = file.read(8)
        whole.update(length + file.read(int.from_bytes(length, "little")))
        for tensor in tensors.values():
            one = hashlib.sha256(f"{tensor.dtype} {tensor.shape} ".encode())
            for chunk in _chunks(file, tensor):
                hashing = beside.submit(one.update, chunk)
                whole.update(chunk)
                hashing.result()
            digests[tensor.name] = one.hexdigest()
    return whole.hexdigest(), digests


def _chunks(file: BinaryIO, tensor: TensorInfo) -> Iterator[bytes]:
    for start in range(0, tensor.nbytes, _CHUNK):
        yield file.read(min(_CHUNK, tensor.nbytes - start))
