"""Many claimers and many submitters at once, on both databases."""

from __future__ import annotations

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import ModuleType

import pytest

from bitmill_workers.settings import Settings
from bitmill_workers.store.jobs import JobStore
from stores import spec

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])


def benchmark() -> ModuleType:
    place = Path(__file__).parents[2] / "benchmarks" / "claims.py"
    loader = importlib.util.spec_from_file_location("claims", place)
    assert loader is not None
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[module.__name__] = module
    loader.loader.exec_module(module)
    return module


def test_sixteen_claimers_take_each_of_two_thousand_jobs_once(settings: Settings) -> None:
    result = benchmark().race(settings.database, jobs=2000, claimers=16)
    assert (result["jobs"], result["claims_per_second"] > 0) == (2000, True)


def test_a_key_submitted_by_twelve_at_once_makes_one_job(store: JobStore) -> None:
    together = Barrier(12, timeout=60)

    def submit(_: int) -> list[str]:
        try:
            return [submitted_with(f"k{i}") for i in range(17)]
        except BaseException:
            together.abort()
            raise

    def submitted_with(key: str) -> str:
        together.wait()
        return store.submit(spec(), idempotency_key=key, request_hash="h").job.id

    with ThreadPoolExecutor(12) as pool:
        made = list(pool.map(submit, range(12)))
    assert [len(set(ids)) for ids in zip(*made, strict=True)] == [1] * 17
    assert len(store.list().jobs) == 17
