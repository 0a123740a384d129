"""What all tests share."""

from __future__ import annotations

import gc
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from warm_python import FORKED, warm_python

if TYPE_CHECKING:
    from servers import Postgres

SESSION = "BITMILL_TEST_SESSION"
"""Environment variable: id and folder of the process that starts those that run tests."""


def pytest_configure(config: pytest.Config) -> None:
    gc.set_threshold(10_000, 20, 20)  # what was imported is large, and never garbage
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="warm-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ[SESSION] = f"{os.getpid()} {folder.name}"


@pytest.fixture(scope="session", autouse=True)
def quick_children() -> Iterator[None]:
    """Jobs of this session start children that need not import everything."""
    process, folder = os.environ[SESSION].split(" ", 1)
    with warm_python(Path(folder), int(process)):
        yield


@pytest.fixture(scope="session", autouse=True)
def transformers_is_not_asked() -> Iterator[None]:
    """By services: it takes seconds a model in each; `service/test_skeleton_check.py` asks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITMILL_SKELETON_CHECK_S", "0")
        yield


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """So are the children of services and programs that the test starts."""
    for name, value in FORKED.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for all tests that want PostgreSQL."""
    from servers import Postgres

    if Postgres.programs is None:
        pytest.skip("PostgreSQL is not installed (Debian package postgresql)")
    server = Postgres()
    server.start()
    yield server
    server.destroy()
