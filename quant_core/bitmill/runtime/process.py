"""Settings of a process that computes: for good in a process of our own, else for a while.

Torch-free until it is called.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

SWITCH_S = 1e-4
"""How long a thread that wants the interpreter waits for another. In Python's own 5 ms the
accelerator gets no launches while blocks are loaded and saved beside."""

_SAME_BYTES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""What cuBLAS needs to give the same bytes each time, where the environment does not say."""

_ALONE = threading.RLock()
"""What is set of a process is set for all of its threads."""


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

    What the caller chose otherwise (a default dtype or device, autocast, inference mode, ...) has
    no say meanwhile; only what the environment says of cuBLAS stays. Behind it, after an error too,
    the process is as it was: all of that, the interpreter's switch interval, the environment and
    the state of random numbers. Threads that want to compute wait for each other.
    """
    import torch

    with _ALONE, ExitStack() as back:
        back.callback(torch.set_num_threads, torch.get_num_threads())
        back.enter_context(_full_precision())
        back.enter_context(_fresh_modes())
        back.enter_context(_random_numbers())
        back.callback(sys.setswitchinterval, sys.getswitchinterval())
        missing = {k: v for k, v in _SAME_BYTES.items() if k not in os.environ}
        back.enter_context(environment(missing))
        if threads is not None:
            torch.set_num_threads(threads)
        sys.setswitchinterval(SWITCH_S)
        yield


@contextmanager
def _fresh_modes() -> Iterator[None]:
    """Modes of torch as in a process that has just loaded it."""
    import torch

    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def _random_numbers() -> Iterator[None]:
    """Whatever is drawn within, of libraries' own seeds too, the caller's numbers go on as before.

    Of accelerators those that are in use already.
    """
    import numpy as np
    import torch

    states: list[tuple[Callable[[Any], object], Any]] = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_initialized():
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    try:
        yield
    finally:
        for give_back, state in states:
            give_back(state)


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


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels of torch within, where CUBLAS_WORKSPACE_CONFIG is set for them.

    Else fused attention adds the gradients of queries up by atomics, in any order. A forward pass
    whose gradients are taken belongs within too: torch chooses an attention kernel there, and that
    of cuDNN runs its one backward pass whatever is asked for then (torch 2.11, H200). A kernel that
    torch has in no deterministic form raises RuntimeError.
    """
    import torch

    switches: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    possible = not torch.cuda.is_available() or "CUBLAS_WORKSPACE_CONFIG" in os.environ
    torch.use_deterministic_algorithms(before[0] or possible)
    switches.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warn_only)
        switches.fill_uninitialized_memory = before[1]
