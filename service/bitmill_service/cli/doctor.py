"""`bitmill doctor`: what this machine and installation can do, without changing anything."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import httpx2
from huggingface_hub import constants
from packaging.requirements import Requirement
from sqlalchemy.exc import SQLAlchemyError

from bitmill.errors import BitmillError
from bitmill.runtime.child import death
from bitmill_service.client.client import Client
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.db import Database
from bitmill_workers.store.migrate import current_revision, head_revision

_PACKAGES = ("torch", "transformers", "triton", "fastapi", "celery", "huggingface_hub")
_NEEDED = ("torch", "transformers")
_LOW_DISK = 10 << 30
_LOW_MEMORY = 4 << 30
_ASK_TORCH = """
import json, torch
from bitmill.runtime.memory import free_host_bytes
devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
print(json.dumps({
    "cuda": torch.version.cuda,
    "devices": [[p.name, p.total_memory, f"{p.major}.{p.minor}"] for p in devices],
    "free": free_host_bytes(),
}))
"""


@dataclass(frozen=True)
class Check:
    """One finding: "ok", "warning" (works, but look at it) or "error" (does not work).

    fix: what to do about it.
    """

    name: str
    state: Literal["ok", "warning", "error"]
    text: str
    fix: str | None = None


def run_checks(settings: ServiceSettings, url: str | None) -> Iterator[Check]:
    """All findings, cheapest first."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield from _packages()
    yield from _compilers()
    yield _disk(settings)
    yield _database(settings)
    service = _service(url)
    yield service
    yield _port(settings, serving=service.text.endswith(" is ready"))
    if settings.broker_url is not None:
        yield _broker(settings.broker_url)
    yield _hub(settings)
    yield from _torch()


def _packages() -> Iterator[Check]:
    """Versions, held against what this distribution asks for."""
    yield Check("bitmill", "ok", version("bitmill"))
    asked = [Requirement(line) for line in requires("bitmill") or ()]
    for name in _PACKAGES:
        try:
            found = version(name)
        except PackageNotFoundError:
            if name in _NEEDED:
                yield Check(
                    name,
                    "warning",
                    "not installed: nothing can be quantized or run here",
                    "pip install 'bitmill[torch]'",
                )
            else:
                yield Check(name, "ok", "not installed (optional)")
            continue
        missed = [one for one in asked if one.name == name and found not in one.specifier]
        if missed:
            wanted = f"{name}{missed[0].specifier}"
            yield Check(name, "error", f"{found}, needed is {wanted}", f"pip install '{wanted}'")
        else:
            yield Check(name, "ok", found)


def _compilers() -> Iterator[Check]:
    """What the compiled products of CPUs and of CUDA are built with at first use."""
    for name, variable, usual, what in (
        ("C++ compiler", "CXX", "g++", "products on the CPU run without the compiled kernel"),
        ("ninja", "", "ninja", "nothing is compiled at first use"),
    ):
        program = os.environ.get(variable) or usual
        found = shutil.which(program)
        if found is None and name == "ninja" and importlib.util.find_spec("ninja"):
            found = "of Python"
        yield (
            Check(name, "ok", found)
            if found
            else Check(name, "warning", f"no {program}: {what}", f"install {usual}")
        )


def _torch() -> Iterator[Check]:
    """Accelerators and memory, as torch sees them."""
    if importlib.util.find_spec("torch") is None:
        return
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", _ASK_TORCH],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired:
        fix = "look at the driver with nvidia-smi; a hung one needs a restart of the machine"
        yield Check("accelerator", "error", "torch did not answer within 120 s", fix)
        return
    if asked.returncode:
        said = asked.stderr.strip().splitlines()[-1:]
        why = said[0] if said else death("its process", asked.returncode).message
        fix = "pip install --force-reinstall torch"
        yield Check("accelerator", "error", f"torch cannot be loaded: {why}", fix)
        return
    told = json.loads(asked.stdout)
    yield _accelerator(told["devices"], told["cuda"], driver=Path("/proc/driver/nvidia/version"))
    yield _memory(told["free"])
    if told["devices"] and shutil.which("nvcc") is None:
        what = "no nvcc: products on the GPU run on Triton instead of the CUDA kernels"
        fix = "install the CUDA toolkit, or set BITMILL_CUDA_LIBRARY to a library built elsewhere"
        yield Check("CUDA compiler", "warning", what, fix)


def _accelerator(devices: list[tuple[str, int, str]], cuda: str | None, driver: Path) -> Check:
    """devices: name, bytes and compute capability. cuda: the version torch was built for."""
    if devices:
        found = (f"{name}, {size / 2**30:.0f} GiB, {able}" for name, size, able in devices)
        return Check("accelerator", "ok", "; ".join(found))
    cores = f"jobs run on {os.cpu_count()} CPU cores"
    if not driver.exists():
        return Check("accelerator", "ok", f"none; {cores}")
    if cuda is None:
        fix = "install a torch that was built for CUDA: https://pytorch.org/get-started"
        return Check(
            "accelerator", "warning", f"there is a GPU, torch is without CUDA; {cores}", fix
        )
    fix = f"update the driver for CUDA {cuda}, and look at CUDA_VISIBLE_DEVICES"
    return Check("accelerator", "warning", f"there is a GPU that torch cannot use; {cores}", fix)


def _memory(free: int) -> Check:
    text = f"{free / 2**30:.1f} GiB free for jobs"
    if free >= _LOW_MEMORY:
        return Check("memory", "ok", text)
    fix = "end other programs, or raise the container's or BITMILL_HOST_BYTES' limit"
    return Check("memory", "warning", text, fix)


def _disk(settings: ServiceSettings) -> Check:
    folder = settings.data.resolve()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / 2**30:.1f} GiB free for {settings.data}"
    if not os.access(existing, os.W_OK):
        fix = "give --data or BITMILL_DATA a folder that you may write to"
        return Check("data folder", "error", f"{existing} cannot be written to", fix)
    if free < _LOW_DISK:
        return Check("data folder", "warning", text, "`bitmill prune`, or another --data")
    return Check("data folder", "ok", text)


def _database(settings: ServiceSettings) -> Check:
    if settings.database_url is None and not Path(settings.data, "bitmill.db").exists():
        return Check("database", "ok", "none yet; `bitmill serve` makes it")
    database = Database(settings.database)
    try:
        current = current_revision(database)
    except SQLAlchemyError as error:
        fix = "look at BITMILL_DATABASE_URL, or restore a backup with `bitmill restore`"
        return Check("database", "error", f"cannot be read: {error.__class__.__name__}", fix)
    finally:
        database.close()
    if current != head_revision():
        needed = f"schema {current or 'none'}, needed is {head_revision()}"
        return Check("database", "error", needed, "`bitmill db upgrade`")
    return Check("database", "ok", f"schema {current}")


def _hub(settings: ServiceSettings) -> Check:
    endpoint = settings.hub_endpoint or constants.ENDPOINT
    try:
        httpx2.get(endpoint, timeout=5, follow_redirects=True)
    except httpx2.HTTPError as error:
        text = f"{endpoint} does not answer ({type(error).__name__})"
        fix = "look at network and proxy, set BITMILL_HUB_ENDPOINT, or submit local models"
        return Check("hub", "warning", text, fix)
    return Check("hub", "ok", endpoint)


def _service(url: str | None) -> Check:
    with Client(url, timeout=3, tries=1) as client:
        try:
            ready = client.ready()
        except BitmillError:
            return Check("service", "ok", f"none at {client.url}")
        if ready:
            return Check("service", "ok", f"{client.url} is ready")
        fix = f"see {client.url}/readyz and the service's log"
        return Check("service", "error", f"{client.url} is not ready", fix)


def _port(settings: ServiceSettings, *, serving: bool) -> Check:
    """Whether `bitmill serve` could listen where it would."""
    place = f"{settings.host}:{settings.port}"
    if serving:
        return Check("port", "ok", f"{place} is the service's, or free")
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.create_server((settings.host, settings.port), family=family):
            return Check("port", "ok", f"{place} is free")
    except OSError as error:
        text = f"{place} cannot be listened at: {error.strerror}"
        fix = "`bitmill serve --port 0` takes a free one; BITMILL_HOST and BITMILL_PORT set both"
        return Check("port", "warning", text, fix)


def _broker(url: str) -> Check:
    import redis

    shown = url.rpartition("@")[2]
    if not url.startswith(("redis:", "rediss:")):
        return Check("broker", "ok", shown)
    try:
        with redis.Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3) as client:
            client.ping()
    except redis.RedisError as error:
        text = f"{shown} does not answer ({type(error).__name__})"
        return Check("broker", "error", text, "start Redis, or look at BITMILL_BROKER_URL")
    return Check("broker", "ok", shown)
