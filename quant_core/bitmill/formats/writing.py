"""Writing a folder of safetensors files tensor by tensor, each where it belongs, hashed on the way.

The place of every tensor is known from names and shapes alone (`io/safetensors.py`), so threads
make, hash and write tensors each at its own pace, and the disk is at work from the first one on.
The files' bytes depend on the tensors only, and their size is the predicted one.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from bitmill.errors import FormatError, ModelError
from bitmill.io.atomic import disk_errors, read_json, write_json
from bitmill.io.companions import companions
from bitmill.io.safetensors import MAX_SHARD_BYTES, ShardWriter, TensorInfo
from bitmill.plan.config_json import sanitize

_THREADS = 4
"""Linears that are read, hashed and written at once."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

CONFIG_NAME = "config.json"

T = TypeVar("T")
R = TypeVar("R")


def write_tensors(
    folder: Path,
    tensors: Sequence[TensorInfo],
    linears: Iterable[str],
    linear: Callable[[str], Mapping[str, Tensor]],
    other: Callable[[str], Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_linear: Callable[[str], None] = lambda _: None,
) -> dict[str, str]:
    """Write safetensors files into an existing, empty folder.

    tensors: all of them, in the order in which shards are filled
    linear: makes the tensors of one of `linears`; other: one of those that are left, by its name;
        threads ask for each once and drop it after
    on_linear: told the name of every linear written, in their order

    Returns the hex SHA-256 of every tensor's bytes by name. Raises FormatError where what is made
    differs from `tensors`, ResourceError where the disk is full.
    """
    with (
        disk_errors(folder),
        _HashedWriter(folder, tensors, max_shard_bytes) as writer,
        ThreadPoolExecutor(_THREADS) as pool,
    ):

        def write_linear(name: str) -> str:
            for key, tensor in linear(name).items():
                writer.write(key, tensor)
            return name

        for name in _in_order(pool, write_linear, linears):
            on_linear(name)
        for _ in _in_order(pool, lambda name: writer.write(name, other(name)), writer.missing()):
            pass
    return writer.digests


def write_model(
    folder: Path,
    tensors: Sequence[TensorInfo],
    linears: Iterable[str],
    linear: Callable[[str], Mapping[str, Tensor]],
    other: Callable[[str], Tensor],
    *,
    source: Path,
    settings: Mapping[str, Any],
    on_linear: Callable[[str], None],
) -> dict[str, str]:
    """Write tensors as `write_tensors` does, the companions of `source`, and config.json."""
    digests = write_tensors(folder, tensors, linears, linear, other, on_linear=on_linear)
    with disk_errors(folder):
        copy_companions(source, folder)
    write_settings(folder, settings)
    return digests


def source_settings(folder: Path) -> dict[str, Any]:
    """config.json of a source model, without keys that name code.

    Raises ModelError where the source is quantized already.
    """
    settings: dict[str, Any] = sanitize(read_json(folder / CONFIG_NAME))
    if settings.get("quantization_config"):
        raise ModelError(
            f"{CONFIG_NAME} of the source has a quantization_config already: "
            "give the model that was quantized, not its quantized copy",
            code="already_quantized",
            param="quantization_config",
        )
    return settings


def sha256_of_tensor(tensor: Tensor) -> str:
    """Hex SHA-256 of a tensor's bytes as they are stored."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write config.json."""
    write_json(folder / CONFIG_NAME, dict(settings))


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the files that travel with weights (`io/companions.py`), never any code."""
    for path in companions(source):
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, folder / path)


def _in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work(item)` of every item in order; `_THREADS` of them are under way ahead of the caller."""
    ahead: deque[Future[R]] = deque()
    for item in items:
        if len(ahead) == _THREADS:
            yield ahead.popleft().result()
        ahead.append(pool.submit(work, item))
    while ahead:
        yield ahead.popleft().result()


class _HashedWriter:
    """A `ShardWriter` that holds tensors to their plan and hashes them while they are written."""

    def __init__(self, folder: Path, tensors: Sequence[TensorInfo], max_bytes: int) -> None:
        self._planned = {tensor.name: tensor for tensor in tensors}
        self._digests: dict[str, str] = {}
        self._hashing = ThreadPoolExecutor(_THREADS, thread_name_prefix="hash")
        self._files = ShardWriter(folder, tensors, max_bytes)

    def __enter__(self) -> Self:
        self._files.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hashing.shutdown()
        self._files.__exit__(*error)
        if error[0] is None:
            self._files.write_index(sorted(self._planned))

    @property
    def digests(self) -> dict[str, str]:
        """Hex SHA-256 of every tensor written by name, in the order of the files."""
        return {name: self._digests[name] for name in self._planned if name in self._digests}

    def missing(self) -> list[str]:
        """Names not written so far, in the order of the files."""
        return [name for name in self._planned if name not in self._digests]

    def write(self, name: str, tensor: Tensor) -> None:
        planned = self._planned.get(name)
        if planned is None or name in self._digests:
            problem = "was written already" if name in self._digests else "has no place in the plan"
            raise FormatError(f"tensor {name} {problem}", param=name)
        if tensor.dtype != DTYPES[planned.dtype] or tuple(tensor.shape) != planned.shape:
            raise FormatError(
                f"tensor {name} is {tensor.dtype} of shape {tuple(tensor.shape)}: "
                f"the plan says {planned.dtype} of shape {planned.shape}",
                param=name,
            )
        data = tensor_bytes(tensor)
        digest = self._hashing.submit(hashlib.sha256, data)
        self._files.write(name, data)
        self._digests[name] = digest.result().hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Little-endian bytes of a tensor of any dtype, row-major."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
