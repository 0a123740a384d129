"""The work of a process's first Triton launch that needs no device, done ahead in a thread.

Triton looks up a compiled kernel by a hash that covers its own library of 400 MB, made once in a
process. The main thread goes on meanwhile: reading and hashing leave the interpreter to it.
"""

from __future__ import annotations

from contextlib import suppress
from threading import Thread

import torch


def warm_up(device: torch.device) -> Thread | None:
    """Begin it where `device` runs Triton; the thread, or None. Nothing has to wait for it."""
    if device.type != "cuda":
        return None
    thread = Thread(target=_hash_triton, name="warm-up", daemon=True)
    thread.start()
    return thread


def _hash_triton() -> None:
    with suppress(ImportError):  # without Triton, or one that keeps its hash elsewhere
        from triton.runtime.cache import triton_key

        triton_key()
