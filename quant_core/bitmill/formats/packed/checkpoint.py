"""A packed Hugging Face folder: writing it tensor by tensor, and reading it with every check.

Writing needs no more memory than a few linears: the place of every tensor is known from names and
shapes alone (`io/safetensors.py`), so threads read, hash and write them where they belong, each at
its own pace, and the disk is at work from the first one on. The files' bytes depend on the tensors
only, and their size is the predicted one.

Reading trusts nothing: format version, names, shapes, dtypes, scales, zeros, column orders and
padding bits are checked, and a FormatError names the tensor at fault.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap, LinearShape
from bitmill.errors import FormatError, ModelError
from bitmill.formats.packed.config import PackedConfig, PackedLinear
from bitmill.formats.packed.layout import linear_tensors
from bitmill.io.atomic import disk_errors, read_json, write_bytes, write_json
from bitmill.io.companions import companions
from bitmill.io.safetensors import (
    MAX_SHARD_BYTES,
    ShardWriter,
    TensorInfo,
    read_headers,
    safetensors_files,
)
from bitmill.plan.config_json import sanitize
from bitmill.quant.rewrites import Rewrites, check_order
from bitmill.quant.tensors import PackedTensor, Stored

_THREADS = 4
"""Linears that are read, hashed and written at once."""

CONFIG_NAME = "config.json"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

T = TypeVar("T")
R = TypeVar("R")


def write_checkpoint(
    folder: Path,
    *,
    source: Path,
    tensors: Sequence[TensorInfo],
    bit_widths: BitWidthMap,
    linear: Callable[[str], Stored],
    other: Callable[[str], Tensor],
    orders: Mapping[str, str | None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_linear: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Write a packed model into the existing, empty `folder`.

    source: folder of the source model; its config and tokenizer are taken over
    tensors: what `stored_tensors` gives for this map, in that order
    linear, other: supply a quantized linear by its name, any other tensor by its own; threads ask
        for each once and drop it after
    orders: name of the tensor that holds a linear's column order
    on_linear: told the name of every linear written, in the order of the map

    Returns the hex SHA-256 of every stored tensor's bytes by name. Raises FormatError where what
    is supplied differs from `tensors`, ResourceError where the disk is full.
    """
    config = PackedConfig.from_map(bit_widths, orders)
    with (
        disk_errors(folder),
        _HashedWriter(folder, tensors, max_shard_bytes) as writer,
        ThreadPoolExecutor(_THREADS) as pool,
    ):

        def write_linear(packed: PackedLinear) -> str:
            weight = linear(packed.name)
            tensors = weight.tensors(packed.name)
            if packed.owns_order:
                tensors |= weight.rewrites.tensors(packed.name)
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            return packed.name

        for name in _in_order(pool, write_linear, config.linears.values()):
            if on_linear:
                on_linear(name)
        for _ in _in_order(pool, lambda name: writer.write(name, other(name)), writer.missing()):
            pass
    with disk_errors(folder):
        copy_companions(source, folder)
    write_bytes(folder / MAP_NAME, bit_widths.to_json().encode())
    write_packed_config(source, folder, config)
    return writer.digests


def _in_order(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work(item)` of every item in order; `_THREADS` of them are under way ahead of the caller."""
    ahead: deque[Future[R]] = deque()
    for item in items:
        if len(ahead) == _THREADS:
            yield ahead.popleft().result()
        ahead.append(pool.submit(work, item))
    while ahead:
        yield ahead.popleft().result()


def write_packed_config(source: Path, folder: Path, config: PackedConfig) -> None:
    """Write config.json: the source's without keys that name code, and with the packed format."""
    settings = sanitize(read_json(source / CONFIG_NAME))
    if settings.get("quantization_config"):
        raise ModelError(
            f"{CONFIG_NAME} of the source has a quantization_config already: "
            "give the model that was quantized, not its quantized copy",
            code="already_quantized",
            param="quantization_config",
        )
    write_json(folder / CONFIG_NAME, settings | {"quantization_config": config.to_dict()})


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the files that travel with weights (`io/companions.py`), never any code."""
    for path in companions(source):
        (folder / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / path, folder / path)


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


@dataclass(frozen=True)
class PackedCheckpoint:
    """A packed folder whose config and headers were read; tensors are read on demand."""

    folder: Path
    config: PackedConfig
    headers: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> PackedCheckpoint:
        """Read config.json and the safetensors headers.

        Raises FormatError for a config that is not of a packed model, ModelError for safetensors
        files that are missing or damaged.
        """
        settings = read_json(folder / CONFIG_NAME)
        quantization = settings.get("quantization_config") if isinstance(settings, dict) else None
        if not isinstance(quantization, dict):
            raise FormatError(
                f"{folder.name} is not a packed model: {CONFIG_NAME} has no quantization_config",
                param=CONFIG_NAME,
            )
        return cls(folder, PackedConfig.from_dict(quantization), read_headers(folder))

    @property
    def file_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(file.stat().st_size for file in safetensors_files(self.folder))

    def check_linears(self, shapes: Sequence[LinearShape]) -> None:
        """Compare the stored linears' headers with the model's shapes, by name.

        Raises FormatError naming the first tensor that is missing, superfluous or of another
        dtype or shape.
        """
        by_name = {shape.name: shape for shape in shapes}
        for name, packed in self.config.linears.items():
            if name not in by_name:
                raise FormatError(f"linear {name} is not in the model", param=name)
            expected = linear_tensors(by_name[name], packed.widths, owns_order=packed.owns_order)
            for spec in expected:
                _check_header(self.headers.get(spec.name), spec)
            self._check_no_others(name, {spec.name for spec in expected})

    def tensor(self, name: str) -> Tensor:
        """A stored tensor by its name, on the CPU. Raises FormatError where it is missing."""
        if name not in self.headers:
            raise FormatError(f"tensor {name} is missing from the checkpoint", param=name)
        path = self.folder / self.headers[name].file
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def linear(self, shape: LinearShape) -> PackedTensor:
        """The packed tensors of one linear, its column order included, checked in full."""
        packed = self.config.linears.get(shape.name)
        if packed is None:
            raise FormatError(f"linear {shape.name} is not quantized here", param=shape.name)
        order = self.tensor(packed.order) if packed.order else None
        if order is not None:
            check_order(order, shape.columns, packed.order or "")
        rewrites = Rewrites.of_order(order)
        names = [spec.name for spec in linear_tensors(shape, packed.widths)]
        tensors = {name: self.tensor(name) for name in names if name in self.headers}
        return PackedTensor.from_tensors(
            shape.name, tensors, shape.rows, shape.columns, packed.widths, rewrites
        )

    def _check_no_others(self, linear: str, expected: set[str]) -> None:
        prefix = f"{linear}."
        for name in self.headers:
            if name.startswith(prefix) and name not in expected | {f"{linear}.bias"}:
                raise FormatError(f"tensor {name} does not belong to the format", param=name)


def read_bit_width_map(folder: Path) -> BitWidthMap:
    """The bit-width map of a packed folder. Raises FormatError where it is missing or damaged."""
    return BitWidthMap.load(folder / MAP_NAME)


def _check_header(found: TensorInfo | None, spec: TensorInfo) -> None:
    if found is None:
        raise FormatError(f"tensor {spec.name} is missing from the checkpoint", param=spec.name)
    if found.dtype != spec.dtype or found.shape != spec.shape:
        raise FormatError(
            f"tensor {spec.name} is {found.dtype} of shape {found.shape}: "
            f"the format says {spec.dtype} of shape {spec.shape}",
            param=spec.name,
        )
