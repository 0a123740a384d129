"""A real API on a real database, without a worker; jobs are moved by hand through the store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from bitmill_service.cli import main as cli
from bitmill_service.client.client import Client
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.migrate import upgrade
from browsing import WIDTHS, Browser, browse
from finished import Stack
from serving import serve
from tiny import tiny_llama


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with one tiny model, `tiny`."""
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "tiny")
    return root


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Stack]:
    """The API of one module, serving."""
    settings = ServiceSettings(
        data=tmp_path_factory.mktemp("data"),
        model_roots={"models": models},
        event_poll_s=0.05,
        max_body=1 << 20,
    )
    app = create_app(settings)
    upgrade(app.state.context.database)
    with serve(app) as url:
        yield Stack(url, app.state.context)


@pytest.fixture(scope="module")
def http(stack: Stack) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=stack.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.url, sleep=lambda _: None) as opened:
        yield opened


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the browser puts what it downloads."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of PNGs of every page, for people to look at."""
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def window(stack: Stack, downloads: Path) -> Iterator[Browser]:
    """One browser for all tests."""
    with browse(stack.url, downloads) as opened:
        yield opened


@pytest.fixture
def browser(window: Browser, stack: Stack) -> Iterator[Browser]:
    """The browser, on the service that asks for no key. After a test its pages must have run
    without a warning and asked no other host for anything."""
    window.url = stack.url
    window.look("light", WIDTHS["wide"])
    yield window
    assert window.complaints() == []
    assert window.strangers() == []


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`bitmill ...` through its entry point: exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bitmill", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run
