"""Settings of a process that computes on an accelerator, to be made before it first does."""

from __future__ import annotations

import os
import sys

import torch

SWITCH_S = 1e-4
"""How long a thread that wants the interpreter waits for another. In Python's own 5 ms the
accelerator gets no launches while blocks are loaded and saved beside."""


def settle_process() -> None:
    """Products in full fp32, the same bytes from cuBLAS each time, memory without holes.

    The allocator's segments can grow, because factors of unlike widths leave holes in fixed ones.
    What the environment says stays. May be called again.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    sys.setswitchinterval(SWITCH_S)
