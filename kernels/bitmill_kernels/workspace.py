"""Scratch memory of the kernels, shared by all linears of a device and never freed.

CUDA graphs bake pointers in: a buffer that was handed out keeps its address, and a larger demand
gets a new buffer. Kernels on one stream run one after the other, so they can share; running two
linears of one device on two streams at once is not supported. Sums that two streams mix up in a
buffer that is kept filled stay there, and later products take them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BUFFERS: dict[tuple[str, torch.device, int | None], list[Tensor]] = {}


NOTHING = 0xFF
"""Bytes of a sum that nobody has left yet (`hopper/sums.h`)."""


def workspace(
    purpose: str, nbytes: int, device: torch.device, *, fill: int | None = None
) -> Tensor:
    """A buffer u8 of at least `nbytes` for a purpose on a device.

    fill: what all bytes of a new buffer are, where kernels count on it and leave it so; such a
    buffer is handed to nobody who asks without. Else its contents are undefined.
    """
    buffers = _BUFFERS.setdefault((purpose, device, fill), [])
    if not buffers or buffers[-1].numel() < nbytes:
        buffers.append(torch.empty(nbytes, dtype=torch.uint8, device=device))
        if fill is not None:
            buffers[-1].fill_(fill)
    return buffers[-1]
