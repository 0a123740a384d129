"""How much memory a process may still take, of the host and of accelerators."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from bitmill.errors import (
    BitmillError,
    ResourceError,
    asked_bytes,
    out_of_memory,
    refused_memory,
    said_by,
)

HOST_LIMIT = "BITMILL_HOST_BYTES"
"""Environment variable: bytes of host memory that a job may take of what the machine has."""

_UNKNOWN = 1 << 62
"""Bytes of a machine that does not tell."""

_CAREFUL = 8 << 30
"""Bytes that such a machine is taken to have where memory is a matter of speed."""


def free_host_bytes(system: Path = Path("/")) -> int:
    """What of the machine's memory, or its cgroup's, or of `HOST_LIMIT`, is free for this process.

    Cached files count as free. system: the folder that holds `proc` and `sys`. Raises ResourceError
    where the limit is no number of bytes.
    """
    group = system / "sys/fs/cgroup"
    free = _bytes_in(system / "proc/meminfo").get("MemAvailable", _UNKNOWN)
    pages = _bytes_in(group / "memory.stat")
    with suppress(OSError, ValueError, KeyError):
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        free = min(free, limit - used + pages["inactive_file"] + pages["active_file"])
    if text := os.environ.get(HOST_LIMIT):
        free = min(free, _limit(text) - own_host_bytes(system))
    return max(0, free)


def _limit(text: str) -> int:
    if not text.isdecimal():
        raise ResourceError(
            f"{HOST_LIMIT} is {text!r}: give a whole number of bytes, or leave it out",
            code="bad_host_limit",
            param=HOST_LIMIT,
        )
    return int(text)


def own_host_bytes(system: Path = Path("/")) -> int:
    """What this process has taken itself, without files."""
    return _bytes_in(system / "proc/self/status").get("RssAnon", 0)


def refusal(error: BaseException, device: torch.device) -> ResourceError | None:
    """What stands for memory that was refused: what was asked, what is free; None for other errors.

    Call it where the error is caught first, while what the failed work holds is still held.
    """
    refused = refused_memory(error)
    if refused is None:
        return None
    asked = asked_bytes(refused)
    said = said_by(refused) if asked is None else f"{asked:,} bytes were asked for"
    free = f"{free_host_bytes():,} bytes of host memory are free"
    if device.type == "cuda":
        free = f"{_free_after_refusal(device)} of accelerator memory and {free}"
    return out_of_memory(f"memory ran out: {said}; {free}")


def raise_refusal(error: BaseException) -> None:
    """Raise what `refusal` gives for the accelerator that this process uses; no `BitmillError`."""
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    lack = None if isinstance(error, BitmillError) else refusal(error, device)
    if lack is not None:
        raise lack from error


def _free_after_refusal(device: torch.device) -> str:
    try:
        return f"{free_device_bytes(device):,} bytes"
    except RuntimeError:  # an accelerator without any room does not answer either
        return "unknown bytes"


def spare_host_bytes() -> int:
    """Half of the free host memory."""
    free = free_host_bytes()
    return (free if free < _UNKNOWN else _CAREFUL) // 2


def free_device_bytes(device: torch.device) -> int:
    """What this process may still take of an accelerator's memory; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def spare_device_bytes(device: torch.device) -> int:
    """A third of an accelerator's free memory; 0 on a CPU."""
    return free_device_bytes(device) // 3


def _bytes_in(file: Path) -> dict[str, int]:
    """Bytes by name of a file of lines like "Name: 12 kB" or "name 12"; none without the file."""
    try:
        text = file.read_text()
    except OSError:
        return {}
    found = re.findall(r"^(\w+):?\s+(\d+)( kB)?$", text, re.MULTILINE)
    return {name: int(value) * (1024 if unit else 1) for name, value, unit in found}
