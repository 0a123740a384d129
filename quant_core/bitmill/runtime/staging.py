"""Copies of the source's weights to a CUDA device that leave other threads free to launch.

A copy out of a mapped file goes through the driver's own buffers, and while it does other threads'
launches wait. So pieces go to page-locked memory first, which the device fetches by itself, while
the next piece is read into a second buffer.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

PIECE_BYTES = 32 << 20


class Staging:
    """Two page-locked buffers of one device, made when they are first needed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = Lock()
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []

    def to_device(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in host memory; on CUDA the current stream makes it."""
        if self._device.type != "cuda":
            return tensor.to(self._device)
        result = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        given, made = (t.reshape(-1).view(torch.uint8) for t in (tensor, result))
        pieces = zip(given.split(PIECE_BYTES), made.split(PIECE_BYTES), strict=True)
        with self._lock:
            for i, (piece, place) in enumerate(pieces):
                buffer, fetched = self._buffer(i % 2)
                fetched.synchronize()
                own = buffer[: len(piece)].copy_(piece)
                place.copy_(own, non_blocking=True)
                fetched.record(torch.cuda.current_stream(self._device))
        return result

    def _buffer(self, i: int) -> tuple[Tensor, torch.cuda.Event]:
        while len(self._buffers) <= i:
            buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            self._buffers.append((buffer, torch.cuda.Event(blocking=True)))
        return self._buffers[i]
