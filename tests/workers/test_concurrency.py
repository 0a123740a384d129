"""Many claimers and many submitters at once, on both databases."""

from __future__ import annotations

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from bitmill_workers.jobs import JobStore
from bitmill_workers.settings import Settings
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


def test_one_key_submitted_two_hundred_times_makes_one_job(store: JobStore) -> None:
    def submit(_: int) -> str:
        return store.submit(spec(), idempotency_key="k", request_hash="h").job.id

    with ThreadPoolExecutor(12) as pool:
        made = set(pool.map(submit, range(200)))
    assert len(made) == 1
    assert len(store.list().jobs) == 1
