"""How the CUDA kernels of this package's headers are compiled."""

from __future__ import annotations

from pathlib import Path

import torch

HOPPER = (9, 0)
"""The only devices that have `wgmma`."""

HEADERS = tuple(Path(__file__).with_name(name) for name in ("units.h", "sums.h", "wgmma.h"))


def architecture_flags() -> list[str]:
    """What nvcc needs for `wgmma` where this device has it; torch may leave it out."""
    if torch.cuda.get_device_capability() == HOPPER:
        return ["-gencode=arch=compute_90a,code=sm_90a"]
    return []
