"""Free and total memory of the accelerators that this process may use, asked of the driver.

NVIDIA's management library answers without a context on the device and without torch, which a
worker never imports. `CUDA_VISIBLE_DEVICES` chooses as it does for CUDA: by number or by UUID, up
to the first entry that names none.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of all visible devices together."""

    free: int
    total: int


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def device_memory(
    device: str, env: Mapping[str, str] = os.environ, library: str = _LIBRARY
) -> DeviceMemory | None:
    """The memory of a worker's devices; None for a worker on CPUs, and where none can be asked."""
    if device == "cpu":
        return None
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return None
    if driver.nvmlInit_v2() != 0:
        return None
    try:
        found = list(_memories(driver, device, env.get("CUDA_VISIBLE_DEVICES")))
    finally:
        driver.nvmlShutdown()
    if not found:
        return None
    return DeviceMemory(sum(one.free for one in found), sum(one.total for one in found))


def _memories(driver: ctypes.CDLL, device: str, visible: str | None) -> Iterator[_Memory]:
    handles = list(_handles(driver, visible))
    number = device.removeprefix("cuda:")
    if number.isdecimal():
        handles = handles[int(number) : int(number) + 1]
    for handle in handles:
        memory = _Memory()
        if driver.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0:
            yield memory


def _handles(driver: ctypes.CDLL, visible: str | None) -> Iterator[ctypes.c_void_p]:
    count = ctypes.c_uint()
    if driver.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return
    names = [str(i) for i in range(count.value)] if visible is None else visible.split(",")
    for name in map(str.strip, names):
        handle = ctypes.c_void_p()
        if name.isdecimal():
            status = driver.nvmlDeviceGetHandleByIndex_v2(int(name), ctypes.byref(handle))
        else:
            status = driver.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
        if status != 0:
            return
        yield handle
