"""What all tests share."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from warm_python import warm_python


def pytest_configure() -> None:
    gc.set_threshold(10_000, 20, 20)  # what was imported is large, and never garbage


@pytest.fixture(scope="session", autouse=True)
def quick_children() -> Iterator[None]:
    """Jobs of this process start children that need not import everything."""
    with tempfile.TemporaryDirectory(prefix="warm-") as folder, warm_python(Path(folder)):
        yield
