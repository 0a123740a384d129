"""Refined blocks on disk, and a thread that saves one while the caller goes on.

A finished block is one `block-00012.safetensors` of packed tensors beside a `block-00012.json` of
reports and hashes, which is written last: a block is finished where both exist. Embeddings and
heads that are quantized too are the part before the first block, `embeddings.safetensors`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from bitmill.errors import FormatError
from bitmill.formats.writing import DTYPES, tensor_bytes
from bitmill.io import atomic as storage
from bitmill.io.safetensors import TensorInfo, file_pieces
from bitmill.plan.model_plan import Plan
from bitmill.quant.rewrites import Rewrites
from bitmill.quant.tensors import KINDS, Quantized, Stored
from bitmill.results import LinearResult
from bitmill.runtime.timer import timed

EMBEDDINGS = -1
"""Stands for the embeddings where a block's number is asked for."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def parts_of(plan: Plan) -> Iterator[int]:
    """All blocks, behind the embeddings where they are quantized."""
    yield from range(EMBEDDINGS if plan.embeddings else 0, plan.block_count)


def tensors_path(folder: Path, i: int) -> Path:
    """The packed tensors of block i."""
    return folder / f"{_part_name(i)}.safetensors"


def report_path(folder: Path, i: int) -> Path:
    """The report of block i, which exists once the block is finished."""
    return folder / f"{_part_name(i)}.json"


def is_finished(folder: Path, i: int) -> bool:
    """Whether block i is there. A kill while a folder was removed may leave its report alone."""
    return report_path(folder, i).is_file() and tensors_path(folder, i).is_file()


def is_whole(folder: Path, plan: Plan) -> bool:
    """Whether every part is finished."""
    return all(is_finished(folder, i) for i in parts_of(plan))


def _part_name(i: int) -> str:
    return "embeddings" if i == EMBEDDINGS else f"block-{i:05}"


def save_block(
    folder: Path,
    i: int,
    weights: Mapping[str, Quantized],
    linears: list[LinearResult],
    learning: dict[str, Any] | None,
    changed: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write a finished block: tensors first, then the report that marks it as finished.

    changed: other parameters of the block that are no longer the source's, by their names in the
    module tree.
    Hashes are made in threads while the file is written. On CUDA all work is the current stream's.
    """
    codes = {name: _to_host(weight.codes) for name, weight in weights.items()}
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    for name, weight in weights.items():
        packed = weight.pack()
        kinds[name] = packed.kind
        own = packed.tensors(name) | packed.rewrites.tensors(name)
        tensors |= {key: _to_host(value) for key, value in own.items()}
    tensors |= {name: _to_host(value) for name, value in changed.items()}
    for device in {weight.codes.device for weight in weights.values()}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    data = _file_pieces(tensors)
    with ThreadPoolExecutor() as pool:
        hashes = {name: pool.submit(_sha256, [tensor_bytes(c)]) for name, c in codes.items()}
        whole = pool.submit(_sha256, data)
        storage.write_bytes(tensors_path(folder, i), *data)
    report = {
        "linears": [linear.model_dump(mode="json") for linear in linears],
        "learning": learning,
        "widths": {name: "".join(map(str, weight.widths)) for name, weight in weights.items()},
        "kinds": kinds,
        "rewrites": {name: [r.name for r in weight.rewrites] for name, weight in weights.items()},
        "code_hashes": {name: digest.result() for name, digest in hashes.items()},
        "changed": list(changed),
        "tensors_sha256": whole.result(),
    }
    storage.write_json(report_path(folder, i), report)


def _to_host(tensor: Tensor) -> Tensor:
    """A contiguous tensor in host memory; of one on CUDA, the stream is to be waited for."""
    if tensor.device.type != "cuda":
        return tensor.contiguous()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _file_pieces(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The pieces of a safetensors file; no tensor is copied."""
    infos = [TensorInfo(k, _DTYPE_NAMES[t.dtype], tuple(t.shape)) for k, t in tensors.items()]
    return file_pieces(infos, {name: tensor_bytes(tensor) for name, tensor in tensors.items()})


def _sha256(pieces: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


class BlockSaver:
    """Saves blocks in a thread, one at a time, while the caller goes on.

    folder: where they go; device: where they are computed; on_saved: told the number of a block
    that is saved, in the caller's thread. On CUDA, packing and copies run on a stream of their own.
    What is saved is not to be written to any more. A context manager: no save is under way behind
    it.
    """

    def __init__(self, folder: Path, device: torch.device, on_saved: Callable[[int], None]) -> None:
        self._folder, self._on_saved = folder, on_saved
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save-block")
        self._saving: tuple[int, Future[None]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def save(
        self,
        i: int,
        weights: Mapping[str, Quantized],
        linears: list[LinearResult],
        learning: dict[str, Any] | None,
        changed: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Begin to save block i (see `save_block`), once the block before is saved."""
        self.wait()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        work = partial(save_block, self._folder, i, weights, linears, learning, changed)
        self._saving = i, self._thread.submit(self._aside, work)

    def wait(self) -> None:
        """Return when every block is saved. Raises what went wrong in the thread."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with timed("write"):
                saving[1].result()
            self._on_saved(saving[0])

    def look(self) -> None:
        """Tell if the block is saved by now; else return at once."""
        if self._saving is not None and self._saving[1].done():
            self.wait()

    def _aside(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            work()


class SavedBlock:
    """A finished block, open for reading; threads may read at once."""

    def __init__(self, folder: Path, plan: Plan, i: int) -> None:
        self._plan, self._i = plan, i
        report = storage.read_json(report_path(folder, i))
        self._widths: dict[str, str] = report["widths"]
        self._kinds: dict[str, str] = report.get("kinds", {})
        self._rewrites: dict[str, list[str]] = report.get("rewrites", {})
        self._changed: list[str] = report.get("changed", [])
        self._file = safe_open(tensors_path(folder, i), framework="pt")
        self._keys: dict[str, list[str]] = {}
        keys = self._file.keys()
        for key in sorted(set(keys) - set(self._changed)):
            self._keys.setdefault(key.rpartition(".")[0], []).append(key)

    @property
    def names(self) -> tuple[str, ...]:
        """Its linears."""
        return tuple(self._widths)

    @property
    def changed(self) -> dict[str, Tensor]:
        """Its other parameters that are not the source's, by their names in the module tree."""
        return {name: self._file.get_tensor(name) for name in self._changed}

    def packed(self, name: str) -> Stored:
        """One linear as it is stored. Raises `FormatError` where it is missing or damaged."""
        if name not in self._widths:
            raise FormatError(f"block {self._i} holds no refined {name}", param=name)
        shape, rewrites = self._plan.by_name[name].shape, self.rewrites(name)
        apart = rewrites.tensors(name)
        own = [key for key in self._keys.get(name, ()) if key not in apart]
        tensors = {key: self._file.get_tensor(key) for key in own}
        widths = tuple(int(b) for b in self._widths[name])
        kind = KINDS[self._kinds.get(name, "affine")]
        return kind.from_tensors(name, tensors, shape.rows, shape.columns, widths, rewrites)

    def rewrites(self, name: str) -> Rewrites:
        """The rewrites of one linear."""
        prefix, keys = f"{name}.", self._keys.get(name, ())
        ordered = ["order"] if f"{name}.order" in keys else []  # blocks of 0.1.0 name none
        names = self._rewrites.get(name, ordered)
        return Rewrites.read(names, lambda key: self._file.get_tensor(prefix + key))


def load_block(folder: Path, plan: Plan, i: int) -> dict[str, Quantized]:
    """The refined linears of block i."""
    block = SavedBlock(folder, plan, i)
    return {name: block.packed(name).unpack() for name in block.names}
