"""The compiled CUDA kernels of packed planes in one library.

Compiled by nvcc at first use, through torch's extension loader, and called through ctypes: the
library knows no torch types, so one build serves every torch version. On machines without nvcc,
BITMILL_CUDA_LIBRARY names a library that was built elsewhere.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
from functools import cache
from pathlib import Path

import torch

from bitmill_kernels.compiled import compiled
from bitmill_kernels.hopper.building import HEADERS, HOPPER, architecture_flags

SOURCES = ("decode_cuda.cu", "batch_cuda.cu", "dequantize_cuda.cu")

_LOG = logging.getLogger(__name__)


def available(device: torch.device) -> bool:
    """Whether the library can run on this device: Hopper or later, and a compiler to build it."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        return False
    try:
        load_library()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        _say_unavailable(str(error).partition("\n")[0])
        return False
    return True


@cache
def load_library() -> ctypes.CDLL:
    """Compile the kernels if need be and load them. Raises RuntimeError or OSError on failure."""
    library = ctypes.CDLL(os.environ.get("BITMILL_CUDA_LIBRARY") or _build())
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.bitmill_decode.argtypes = [pointer] + [integer] * 6 + [pointer]
    library.bitmill_batch.argtypes = [pointer] + [integer] * 6 + [pointer]
    library.bitmill_dequantize_rows.argtypes = [pointer, pointer]
    return library


def _build() -> str:
    sources = [Path(__file__).with_name(name) for name in SOURCES]
    flags = ["-O3", "-std=c++17", *architecture_flags()]
    return str(compiled("bitmill_cuda", sources, headers=HEADERS, extra_cuda_cflags=flags))


@cache
def _say_unavailable(reason: str) -> None:
    _LOG.warning("the CUDA kernels are unavailable (%s): Triton takes their place", reason)
