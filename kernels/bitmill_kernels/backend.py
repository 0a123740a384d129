"""Choice between the Triton kernels and the plain torch versions.

`auto` means Triton on a CUDA device where triton is importable, else torch. The environment
variable BITMILL_BACKEND (`auto`, `triton`, `reference`) replaces `auto`, never an explicit
choice. Under TRITON_INTERPRET=1 the Triton kernels also run on CPU tensors.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

BACKENDS = ("auto", "triton", "reference")


def resolve_backend(backend: str, device: torch.device) -> str:
    """`triton` or `reference` for a choice and a device.

    Raises ValueError for an unknown name, or for `triton` where it cannot run.
    """
    choice = backend if backend != "auto" else os.environ.get("BITMILL_BACKEND", "auto")
    if choice not in BACKENDS:
        raise ValueError(f"backend {choice!r} is unknown: use one of {BACKENDS}")
    if choice == "auto":
        return "triton" if device.type == "cuda" and _has_triton() else "reference"
    if choice == "triton" and not (_has_triton() and (device.type == "cuda" or interpreted())):
        raise ValueError(
            f"backend 'triton' cannot run on device {device}: it needs CUDA and the triton "
            "package; use 'reference'"
        )
    return choice


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def wants_reference(backend: str) -> bool:
    """Whether the plain version was asked for, by the caller or by BITMILL_BACKEND."""
    choice = backend if backend != "auto" else os.environ.get("BITMILL_BACKEND", "auto")
    return choice == "reference"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
