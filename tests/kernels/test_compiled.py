"""One build for all processes, and none that waits for a builder that is gone."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = 'extern "C" int answer() { return 42; }'
BUILD = """
import sys
from pathlib import Path
from bitmill_kernels.compiled import compiled
print(compiled("tiny", [Path(sys.argv[1])], extra_cflags=["-O1"]))
"""


def build(source: Path, root: Path) -> Path:
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(root)}
    command = [sys.executable, "-c", BUILD, str(source)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "tiny.cpp").write_text(SOURCE)
    return tmp_path / "tiny.cpp"


def test_a_lock_that_a_killed_builder_left_holds_nobody_up(source: Path, tmp_path: Path) -> None:
    first = build(source, tmp_path / "cache")
    assert ctypes.CDLL(str(first)).answer() == 42
    for name in ("done", first.name):
        (first.parent / name).unlink()
    (first.parent / "lock").touch()
    assert build(source, tmp_path / "cache") == first
    assert first.is_file()
    assert not (first.parent / "lock").exists()


def test_a_finished_build_is_taken_and_another_source_gets_its_own(
    source: Path, tmp_path: Path
) -> None:
    first = build(source, tmp_path / "cache")
    stamp = first.stat().st_mtime_ns
    (first.parent / "lock").touch()
    assert build(source, tmp_path / "cache") == first
    assert first.stat().st_mtime_ns == stamp
    source.write_text(SOURCE.replace("42", "43"))
    second = build(source, tmp_path / "cache")
    assert second != first
    assert ctypes.CDLL(str(second)).answer() == 43
