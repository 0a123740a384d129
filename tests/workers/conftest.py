"""Stores on real databases and workers on real processes, each test with its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmill_workers.settings import Settings
from bitmill_workers.store.catalog import Catalog
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.migrate import upgrade
from servers import Redis


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    """A server of the test's own, so that it may be killed."""
    if Redis.program is None:
        pytest.skip("Redis is not installed (Debian package redis-server)")
    server = Redis(tmp_path / "redis")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def dialect() -> str:
    """Which database the store is on; a module's parametrization replaces it."""
    return "sqlite"


@pytest.fixture
def settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dialect: str, request: pytest.FixtureRequest
) -> Settings:
    """A data folder, a model root with one small model, and the acting runner."""
    url = None
    if dialect == "postgresql":
        url = request.getfixturevalue("postgres").database()
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), before]))
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    return Settings(
        data=tmp_path / "data",
        database_url=url,
        model_roots={"models": model.parent},
        runner_module="acting_runner",
        worker_name="tested",
        queues=("cpu",),
        lease_s=4.0,
        renew_s=0.5,
        poll_s=0.05,
        resend_s=1.0,
    )


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database of this version's schema, to be copied: alembic takes much longer."""
    settings = Settings(data=tmp_path_factory.mktemp("empty"))
    opened = Database(settings.database)
    upgrade(opened)
    opened.close()
    (file,) = settings.data.iterdir()
    return file


@pytest.fixture
def database(settings: Settings, dialect: str, empty: Path) -> Iterator[Database]:
    if dialect == "sqlite":
        settings.data.mkdir()
        shutil.copyfile(empty, settings.data / empty.name)
    opened = Database(settings.database)
    if dialect != "sqlite":
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
