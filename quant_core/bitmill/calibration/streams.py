"""Memory for the hidden states [S, T, D] of all windows, wherever there is room for them.

On the accelerator where they are a sixth of its free memory or less and what a block's turn takes
is left; else on the host, page-locked, which lets the accelerator copy at the bus's full speed;
past a limit in memory-mapped files.

They move to and fro by `runtime/transfers.py`, beside what is computed. Behind a pass the stream
orders what it copied into page-locked memory, so only a reader on the host has to wait for it.
"""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from bitmill.calibration.block_inputs import HostMemory
from bitmill.calibration.hooks import embed_windows
from bitmill.models.streamed import StreamedModel
from bitmill.runtime.memory import free_device_bytes, spare_host_bytes
from bitmill.runtime.ranks import SINGLE, Ranks


class HiddenStates:
    """Allocates hidden states; a context manager, behind which they are not to be used.

    scratch: a folder for files. turn: bytes that a block's turn takes of the accelerator. group:
    ranks that share the host's memory. host_bytes: limit of what this rank keeps in host memory;
    None takes its share of half of what is free.
    """

    def __init__(
        self,
        device: torch.device,
        scratch: Path,
        *,
        turn: int,
        group: Ranks = SINGLE,
        host_bytes: int | None = None,
    ) -> None:
        limit = spare_host_bytes() // group.size if host_bytes is None else host_bytes
        self._device, self._turn = device, turn
        self._memory = HostMemory(limit, scratch)
        self._locked: list[Tensor] = []

    def __enter__(self) -> Self:
        self._memory.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._locked:
            torch.cuda.synchronize(self._device)
        for tensor in self._locked:
            torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
        self._memory.__exit__(*error)

    def embed(self, model: StreamedModel, tokens: Tensor, batch: int) -> Tensor:
        """The first block's inputs [S, T, D] of any number of windows [S, T].

        Raises `ResourceError` where neither memory nor disk holds them.
        """
        hidden = self._empty((*tokens.shape, model.plan.hidden_size), model.dtype)
        return embed_windows(model, tokens, batch=batch, out=hidden)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size <= self._device_room():
            return torch.empty(shape, dtype=dtype, device=self._device)
        spilled = self._memory.spilled
        tensor = self._memory.empty(shape, dtype)
        if self._device.type == "cuda" and size and self._memory.spilled == spilled:
            self._lock(tensor, size)
        return tensor

    def _device_room(self) -> int:
        free = free_device_bytes(self._device)
        return min(free // 6, free - free // 10 - self._turn)

    def _lock(self, tensor: Tensor, size: int) -> None:
        """Page-lock a tensor where the system allows it.

        Done here, because PyTorch's own pinned memory comes in powers of two.
        """
        if int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0)) == 0:
            self._locked.append(tensor)
            return
        with suppress(RuntimeError):  # the next launch reports the refusal once
            torch.zeros(1, device=self._device)
