"""Scratch memory of the kernels, shared by all linears of a device and never freed.

CUDA graphs bake pointers in: a buffer that was handed out keeps its address, and a larger demand
gets a new buffer. Kernels on one stream run one after the other, so they can share; running two
linears of one device on two streams at once is not supported.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BUFFERS: dict[tuple[str, torch.device], list[Tensor]] = {}


def workspace(purpose: str, nbytes: int, device: torch.device) -> Tensor:
    """A buffer u8 of at least `nbytes` for a purpose on a device; its contents are undefined."""
    buffers = _BUFFERS.setdefault((purpose, device), [])
    if not buffers or buffers[-1].numel() < nbytes:
        buffers.append(torch.empty(nbytes, dtype=torch.uint8, device=device))
    return buffers[-1]
