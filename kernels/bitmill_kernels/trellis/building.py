"""Compiled kernels of this folder, which are left out where they cannot be built."""

from __future__ import annotations

import ctypes
import logging
import subprocess
from pathlib import Path
from typing import Any

from bitmill_kernels.compiled import compiled
from bitmill_kernels.hopper.building import HEADERS, architecture_flags

CIRCLES = Path(__file__).with_name("circles_cuda.h")
"""How CUDA kernels read circles."""
_LOG = logging.getLogger(__name__)


def built(source: str, name: str, **options: Any) -> ctypes.CDLL | None:
    """A library of a source file of this folder, or None where it cannot be built."""
    try:
        return ctypes.CDLL(str(compiled(name, [Path(__file__).with_name(source)], **options)))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = str(error).partition("\n")[0]
        _LOG.warning("trellis codes are left to torch, very slowly: %s", reason)
        return None


def built_for_hopper(kernel: str) -> ctypes.CDLL | None:
    """The library of a kernel of `hopper/wgmma.h`, "decode" or "batch", or None as `built`."""
    return built(
        f"{kernel}_cuda.cu",
        f"bitmill_trellis_{kernel}_cuda",
        headers=[*HEADERS, Path(__file__).with_name("arrange_cuda.h"), CIRCLES],
        extra_cuda_cflags=["-O3", "-std=c++17", *architecture_flags()],
    )
