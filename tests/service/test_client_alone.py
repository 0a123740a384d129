"""The client without the server: what `pip install bitmill[client]` brings, and asyncio."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx2
import pytest

from bitmill_service.client.aio import AsyncClient
from bitmill_service.client.errors import ServiceError
from bitmill_service.client.retries import Retries, with_retries
from finished import Stack, spec_json

ROOT = Path(__file__).parents[2]
_WITHOUT = """
import sys
absent = '''
    torch transformers fastapi uvicorn starlette sqlalchemy alembic celery kombu redis psycopg
    prometheus_client pydantic_settings huggingface_hub boto3 gguf safetensors
'''
for name in absent.split():
    sys.modules[name] = None
from bitmill_service.client.aio import AsyncClient
from bitmill_service.cli.main import main
sys.argv = ["bitmill", *sys.argv[1:]]
main()
"""


def test_client_and_job_commands_need_nothing_of_the_server(stack: Stack, tmp_path: Path) -> None:
    job = stack.succeeded().id
    for words in (["status", job], ["download", job, "--out", str(tmp_path / "out")], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-c", _WITHOUT, *words],
            env=os.environ | {"BITMILL_URL": stack.url},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="runs in a source tree")
def test_the_extra_names_neither_torch_nor_the_server() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    brought = {word.split(">")[0] for word in extras["optional-dependencies"]["client"]}
    assert brought == {"httpx2", "typer", "rich", "pyyaml"}


def test_asyncio_client_does_what_the_other_does(stack: Stack, tmp_path: Path) -> None:
    async def use() -> list[str]:
        async with AsyncClient(stack.url, timeout=90) as client:
            job, other = await asyncio.gather(
                client.submit(spec_json()), client.submit(spec_json(label="two"))
            )
            assert job.id != other.id
            cancelled = await client.cancel(job.id)
            assert cancelled.state == "cancelled"
            done = await client.download(stack.succeeded().id, tmp_path)
            assert "model.safetensors" in done.fetched
            with pytest.raises(ServiceError, match="no job 'none'"):
                await client.get("none")
            return [event.data["state"] async for event in client.events(job.id)]

    assert asyncio.run(use()) == ["queued", "cancelled"]


def test_the_client_waits_as_long_as_it_is_asked_or_not_at_all() -> None:
    """Trying again before `Retry-After` is over would only be refused again."""

    def run(asked: str, patience: float | None) -> tuple[list[float], int, int]:
        slept: list[float] = []
        calls = 0

        def send() -> httpx2.Response:
            nonlocal calls
            calls += 1
            if calls < 3:
                return httpx2.Response(429, headers={"Retry-After": asked})
            return httpx2.Response(200)

        retries = Retries(tries=4, sleep=slept.append)
        return slept, with_retries(send, retries, patience=patience).status_code, calls

    assert run("7", None) == ([7.0, 7.0], 200, 3)
    assert run("60", None) == ([], 429, 1)  # a single call does not hang for minutes
    assert run("60", 600.0) == ([60.0, 60.0], 200, 3)
    assert run("700", 600.0) == ([], 429, 1)
