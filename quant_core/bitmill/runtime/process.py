"""Settings of a process that computes: for good in a process of our own, else for a while.

Torch-free until it is called.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

SWITCH_S = 1e-4
"""How long a thread that wants the interpreter waits for another. In Python's own 5 ms the
accelerator gets no launches while blocks are loaded and saved beside."""

_SAME_BYTES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""What cuBLAS needs to give the same bytes each time, where the environment does not say."""


def settle_own_process() -> None:
    """What must be set before an accelerator is first used, in a process that does nothing else.

    The allocator's segments can grow, because factors of unlike widths leave holes in fixed ones.
    What the environment says stays. May be called again.
    """
    for name, value in _SAME_BYTES.items():
        os.environ.setdefault(name, value)
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


@contextmanager
def computing(threads: int | None = None) -> Iterator[None]:
    """Products in full fp32 and the same bytes each time, on so many CPU threads, for a while.

    Behind it, after an error too, the process is as it was: threads, precision, the interpreter's
    switch interval and the environment. What the environment says of cuBLAS stays meanwhile.
    """
    import torch

    with ExitStack() as back:
        back.callback(torch.set_num_threads, torch.get_num_threads())
        back.enter_context(_full_precision())
        back.callback(sys.setswitchinterval, sys.getswitchinterval())
        missing = {k: v for k, v in _SAME_BYTES.items() if k not in os.environ}
        back.enter_context(environment(missing))
        if threads is not None:
            torch.set_num_threads(threads)
        sys.setswitchinterval(SWITCH_S)
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 and no bfloat16 inside of products of float32.

    torch keeps one setting for all backends and one for each; a caller who used both gets an error
    where the first is read, and only the others back.
    """
    import torch

    kinds: Any = torch.backends
    backends = (kinds.cuda.matmul, kinds.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    common = None
    with suppress(RuntimeError):
        common = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if common is not None:
            torch.set_float32_matmul_precision(common)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process and those it starts meanwhile; all others stay as they are."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
