"""Device memory as NVIDIA's management library tells it; a small one in C stands for it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bitmill_workers.execution.device_memory import DeviceMemory, device_memory

# The calls and the structure of nvml.h (CUDA 12): total, free, used as unsigned long long.
_SOURCE = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
int opened = 0;
int nvmlInit_v2(void) { opened++; return 0; }
int nvmlShutdown(void) { opened--; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) {
  if (i >= 3) return 2;
  *device = (void *)(long)(i + 1);
  return 0;
}
int nvmlDeviceGetHandleByUUID(const char *name, void **device) {
  if (strcmp(name, "GPU-c")) return 2;
  *device = (void *)3L;
  return 0;
}
int nvmlDeviceGetMemoryInfo(void *device, memory_t *found) {
  long i = (long)device;
  found->total = i << 36; found->free = i << 33; found->used = found->total - found->free;
  return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(_SOURCE)
    made = folder / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-o", str(made), str(folder / "nvml.c")]
    subprocess.run(command, check=True)
    return str(made)


def memory(*devices: int) -> DeviceMemory:
    return DeviceMemory(sum(i << 33 for i in devices), sum(i << 36 for i in devices))


@pytest.mark.parametrize(
    ("device", "visible", "found"),
    [
        ("auto", None, memory(1, 2, 3)),
        ("cuda", "2, 0", memory(3, 1)),
        ("cuda:1", None, memory(2)),
        ("cuda:1", "2,0", memory(1)),
        ("cuda", "GPU-c,1", memory(3, 2)),
        ("cuda", "0,7,1", memory(1)),
        ("cuda", "", None),
        ("cuda:5", None, None),
        ("cpu", None, None),
    ],
    ids=str,
)
def test_memory_is_that_of_the_visible_devices(
    library: str, device: str, visible: str | None, found: DeviceMemory | None
) -> None:
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert device_memory(device, env, library) == found


def test_without_the_library_nothing_is_known(tmp_path: Path) -> None:
    assert device_memory("auto", {}, str(tmp_path / "libnvidia-ml.so.1")) is None
