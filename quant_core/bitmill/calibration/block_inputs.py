"""Inputs of decoder blocks kept for a backward pass, within a memory limit.

Of L blocks the inputs of every s-th are kept from the forward pass; the others of a segment of s
blocks are computed again when the backward pass reaches it:

    resident = ceil(L / s) + s - 1 inputs of S * T * D values

They stay on the accelerator where its free memory holds them for some s, beside what one block's
turn takes: a copy to the host and back takes longer than running a block again. Else they wait on
the host. s is the smallest that fits the limit, so a large limit means no block runs twice. Where
no s fits, the one with the smallest need is taken and what exceeds the limit lives in memory-mapped
files of a scratch folder. Recomputed inputs come from the same operations on the same batches, so s
does not change a bit of the result.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from bitmill.errors import ResourceError
from bitmill.io.atomic import disk_errors

Step = Callable[[int, Tensor, Tensor], None]
"""Runs block i: (i, its input [S, T, D], where its output goes [S, T, D])."""


def least_inputs(blocks: int) -> int:
    """The fewest inputs that any s keeps at once."""
    return min(math.ceil(blocks / s) + s - 1 for s in range(1, blocks + 1))


def choose_every(blocks: int, bytes_of_input: int, limit: int) -> int:
    """The smallest s whose resident inputs fit `limit` bytes, else the one that needs least."""
    needs = [math.ceil(blocks / s) + s - 1 for s in range(1, blocks + 1)]
    fitting = [s for s, need in enumerate(needs, 1) if need * bytes_of_input <= limit]
    return fitting[0] if fitting else needs.index(min(needs)) + 1


class HostMemory:
    """Allocates tensors: in memory up to `limit` bytes, past it in files below `scratch`.

    The last one given back is handed out again: memory that was in use before takes a copy at once,
    while the system has yet to find the pages of new memory.

    device: whose memory the limit counts; files are mapped on the host. A context manager; leaving
    it removes the files.
    """

    def __init__(
        self,
        limit: int,
        scratch: Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._limit, self._device = limit, device
        self._used = 0
        self._root = scratch
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files = 0
        self._resident: dict[int, int] = {}
        self._spare: Tensor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def spilled(self) -> int:
        """Number of tensors that went to files so far."""
        return self._files

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor; raises `ResourceError` where the disk is full."""
        size = math.prod(shape) * dtype.itemsize
        spare = self._take_spare()
        if spare is not None and spare.shape == shape and spare.dtype == dtype:
            self._used += size
            self._resident[spare.data_ptr()] = size
            return spare
        if self._used + size <= self._limit:
            self._used += size
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
            self._resident[tensor.data_ptr()] = size
            return tensor
        return self._mapped(shape, dtype, size)

    def free(self, tensor: Tensor) -> None:
        """Give the memory of a tensor from `empty` back; the caller drops it."""
        size = self._resident.pop(tensor.data_ptr(), 0)
        if not size or tensor.device.type != "cpu":
            self._used -= size
            return
        self._take_spare()
        self._spare = tensor

    def _take_spare(self) -> Tensor | None:
        """The tensor given back last, whose memory no longer counts."""
        spare, self._spare = self._spare, None
        self._used -= 0 if spare is None else spare.nbytes
        return spare

    def _mapped(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="block-inputs-", dir=self._root)
        path = Path(self._folder.name, f"{self._files}.bin")
        with disk_errors(path), path.open("wb") as handle:
            _reserve(handle.fileno(), size)
        self._files += 1
        flat = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype)
        path.unlink()
        return flat.view(shape)


def _reserve(descriptor: int, size: int) -> None:
    """Claim the blocks now: writing to a mapped hole on a full disk would kill the process."""
    if size:
        os.posix_fallocate(descriptor, 0, size)


class BlockInputs:
    """The input [S, T, D] of any block, asked for from the last one to the first.

    kept: inputs of the blocks 0, s, 2s, ... step: runs one block without gradients.
    """

    def __init__(
        self, first: Tensor, blocks: int, every: int, memory: HostMemory, step: Step
    ) -> None:
        if not 1 <= every <= blocks:
            raise ResourceError(f"cannot keep every {every}th of {blocks} block inputs")
        self._every, self._memory, self._step = every, memory, step
        self._blocks = blocks
        self._held: dict[int, Tensor] = {0: first}

    def forward(self, until: int | None = None) -> Tensor:
        """Run blocks 0..until-1 (all by default) and return what they put out [S, T, D].

        The caller frees the result.
        """
        last = self._blocks if until is None else until
        x = self._held[0]
        for i in range(last):
            y = self._new_like(x)
            self._step(i, x, y)
            if i not in self._held:
                self._memory.free(x)
            if (i + 1) % self._every == 0 and i + 1 < last:
                self._held[i + 1] = y
            x = y
        return x

    def take(self, i: int) -> Tensor:
        """Block i's input; inputs of later blocks are dropped."""
        for later in [k for k in self._held if k > i]:
            self._memory.free(self._held.pop(later))
        start = i - i % self._every
        for k in range(start, i):
            if k + 1 not in self._held:
                y = self._new_like(self._held[k])
                self._step(k, self._held[k], y)
                self._held[k + 1] = y
        return self._held[i]

    def _new_like(self, x: Tensor) -> Tensor:
        return self._memory.empty(tuple(x.shape), x.dtype)
