"""Stores on real databases, each test with its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmill_workers.catalog import Catalog
from bitmill_workers.db import Database
from bitmill_workers.jobs import JobStore
from bitmill_workers.leases import LeaseStore
from bitmill_workers.migrate import upgrade


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{tmp_path / 'bitmill.db'}")
    upgrade(opened)
    yield opened
    opened.close()


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def leases(database: Database) -> LeaseStore:
    return LeaseStore(database, lease_s=60.0)


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database)
