from pathlib import Path

import psutil
import pytest
import torch

from bitmill.errors import ResourceError
from bitmill.runtime import memory as free_memory
from bitmill.runtime.memory import (
    free_device_bytes,
    free_host_bytes,
    own_host_bytes,
    spare_device_bytes,
    spare_host_bytes,
)


def test_free_memory_is_the_machines_or_the_cgroups_with_cached_files(tmp_path: Path) -> None:
    group = tmp_path / "sys" / "fs" / "cgroup"
    (tmp_path / "proc" / "self").mkdir(parents=True)
    group.mkdir(parents=True)
    assert free_host_bytes(tmp_path) > 10**15
    assert own_host_bytes(tmp_path) == 0
    meminfo = "MemTotal: 64 kB\nMemAvailable:   8 kB\nHugePages_Total: 0\n"
    (tmp_path / "proc" / "meminfo").write_text(meminfo)
    (tmp_path / "proc" / "self" / "status").write_text("Name: python\nRssAnon:\t1 kB\n")
    assert free_host_bytes(tmp_path) == 8 * 1024
    assert own_host_bytes(tmp_path) == 1024
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("6000\n")
    (group / "memory.stat").write_text("anon 1000\nactive_file 1000\ninactive_file 2000\n")
    assert free_host_bytes(tmp_path) == 8 * 1024
    (group / "memory.max").write_text("7000\n")
    assert free_host_bytes(tmp_path) == 7000 - 6000 + 3000
    (group / "memory.max").write_text("2000\n")
    assert free_host_bytes(tmp_path) == 0


def test_a_limit_counts_what_the_process_has_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemAvailable: 8 kB\n")
    (tmp_path / "proc" / "self" / "status").write_text("RssAnon:\t1 kB\n")
    for limit, free in (("3072", 2048), ("1000", 0), ("99999", 8192), ("", 8192)):
        monkeypatch.setenv("BITMILL_HOST_BYTES", limit)
        assert free_host_bytes(tmp_path) == free
    monkeypatch.setenv("BITMILL_HOST_BYTES", "96 GiB")
    with pytest.raises(ResourceError, match="BITMILL_HOST_BYTES is '96 GiB'"):
        free_host_bytes(tmp_path)


def test_spare_memory_is_part_of_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < spare_host_bytes() < psutil.virtual_memory().total
    monkeypatch.setattr(free_memory, "free_host_bytes", lambda: 1 << 62)
    assert spare_host_bytes() == 4 << 30


def test_a_cpu_has_no_memory_of_an_accelerator() -> None:
    assert free_device_bytes(torch.device("cpu")) == spare_device_bytes(torch.device("cpu")) == 0
