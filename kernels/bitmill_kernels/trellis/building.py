"""Compiled kernels of this folder, which are left out where they cannot be built."""

from __future__ import annotations

import ctypes
import logging
import subprocess
from pathlib import Path
from typing import Any

from bitmill_kernels.compiled import compiled

CIRCLES = Path(__file__).with_name("circles_cuda.h")
"""How CUDA kernels read circles."""
ARRANGED = (Path(__file__).with_name("arrange_cuda.h"), CIRCLES)
"""What kernels for Hopper include beside `hopper.building.HEADERS`."""

_LOG = logging.getLogger(__name__)


def built(source: str, name: str, **options: Any) -> ctypes.CDLL | None:
    """A library of a source file of this folder, or None where it cannot be built."""
    try:
        return ctypes.CDLL(str(compiled(name, [Path(__file__).with_name(source)], **options)))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = str(error).partition("\n")[0]
        _LOG.warning("trellis codes are left to torch, very slowly: %s", reason)
        return None
