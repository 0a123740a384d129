"""`bitmill doctor`: what this machine and installation can do, without changing anything."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import httpx2
from huggingface_hub import constants
from sqlalchemy.exc import SQLAlchemyError

from bitmill.errors import BitmillError
from bitmill.runtime.child import death
from bitmill_service.client.client import Client
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.db import Database
from bitmill_workers.store.migrate import current_revision, head_revision

_PACKAGES = ("bitmill", "torch", "transformers", "triton", "fastapi", "celery", "huggingface_hub")
_LOW_DISK = 10 << 30


@dataclass(frozen=True)
class Check:
    """One finding: "ok", "warning" (works, but look at it) or "error" (does not work)."""

    name: str
    state: Literal["ok", "warning", "error"]
    text: str


def run_checks(settings: ServiceSettings, url: str | None) -> Iterator[Check]:
    """All findings, cheapest first."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield from _packages()
    yield _accelerator()
    yield _disk(settings)
    yield _database(settings)
    yield _hub(settings)
    yield _service(url)


def _packages() -> Iterator[Check]:
    for name in _PACKAGES:
        try:
            yield Check(name, "ok", version(name))
        except PackageNotFoundError:
            needed = "quantizing needs it" if name in ("torch", "transformers") else "optional"
            yield Check(name, "warning", f"not installed ({needed})")


def _accelerator() -> Check:
    if importlib.util.find_spec("torch") is None:
        return Check("accelerator", "warning", "torch is not installed")
    code = (
        "import torch; print('\\n'.join(f'{p.name}, {p.total_memory / 2**30:.0f} GiB' for p in "
        "map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))))"
    )
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check("accelerator", "error", "torch did not answer within 120 s")
    if asked.returncode:
        said = asked.stderr.strip().splitlines()[-1:]
        why = said[0] if said else death("its process", asked.returncode).message
        return Check("accelerator", "error", f"torch cannot be loaded: {why}")
    found = ", ".join(asked.stdout.split("\n")[:-1])
    cores = os.cpu_count()
    return Check("accelerator", "ok", found or f"none; jobs run on {cores} CPU cores")


def _disk(settings: ServiceSettings) -> Check:
    folder = settings.data.resolve()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / 2**30:.1f} GiB free for {settings.data}"
    if not os.access(existing, os.W_OK):
        return Check("data folder", "error", f"{existing} cannot be written to")
    return Check("data folder", "warning" if free < _LOW_DISK else "ok", text)


def _database(settings: ServiceSettings) -> Check:
    if settings.database_url is None and not Path(settings.data, "bitmill.db").exists():
        return Check("database", "ok", "none yet; `bitmill serve` makes it")
    database = Database(settings.database)
    try:
        current = current_revision(database)
    except SQLAlchemyError as error:
        return Check("database", "error", f"cannot be read: {error.__class__.__name__}")
    finally:
        database.close()
    if current != head_revision():
        return Check("database", "error", f"schema {current}: run `bitmill db upgrade`")
    return Check("database", "ok", f"schema {current}")


def _hub(settings: ServiceSettings) -> Check:
    endpoint = settings.hub_endpoint or constants.ENDPOINT
    try:
        httpx2.get(endpoint, timeout=5, follow_redirects=True)
    except httpx2.HTTPError as error:
        return Check("hub", "warning", f"{endpoint} does not answer ({type(error).__name__})")
    return Check("hub", "ok", endpoint)


def _service(url: str | None) -> Check:
    with Client(url, timeout=3, tries=1) as client:
        try:
            ready = client.ready()
        except BitmillError:
            return Check("service", "ok", f"none at {client.url}")
        state: Literal["ok", "error"] = "ok" if ready else "error"
        return Check("service", state, f"{client.url} is {'ready' if ready else 'not ready'}")
