"""What `bitmill doctor` finds on good and bad ground."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bitmill_service.cli.doctor import (
    Check,
    _accelerator,
    _broker,
    _database,
    _disk,
    _hub,
    _memory,
    _packages,
    _port,
    _service,
)
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.db import Database
from bitmill_workers.store.migrate import upgrade


def test_database_is_absent_current_or_damaged(tmp_path: Path) -> None:
    settings = ServiceSettings(data=tmp_path)
    assert _database(settings).text == "none yet; `bitmill serve` makes it"
    database = Database(settings.database)
    upgrade(database)
    database.close()
    assert _database(settings).state == "ok"
    (tmp_path / "bitmill.db").write_bytes(b"no database" * 1000)
    assert _database(settings).state == "error"


def test_old_schema_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    Database(ServiceSettings(data=tmp_path).database).engine.connect().close()
    found = _database(ServiceSettings(data=tmp_path))
    assert (found.state, found.fix) == ("error", "`bitmill db upgrade`")


def test_folder_hub_and_service_that_are_not_there_are_reported(tmp_path: Path) -> None:
    settings = ServiceSettings(data=tmp_path / "a/b", hub_endpoint="http://127.0.0.1:9")
    assert "free" in _disk(settings).text
    assert _hub(settings).state == "warning"
    found = _service("http://127.0.0.1:9")
    assert found == Check("service", "ok", "none at http://127.0.0.1:9")
    assert not (tmp_path / "a").exists()


def test_installed_packages_are_named_with_their_versions() -> None:
    found = {check.name: check for check in _packages()}
    assert found["fastapi"].state == "ok"
    assert found["bitmill"].text[0].isdigit()
    assert found["torch"].state == "ok"


def test_a_version_that_is_too_old_says_which_is_needed() -> None:
    code = "import importlib.metadata as m; m.version = lambda name: '0.1'\n"
    code += "from bitmill_service.cli.doctor import _packages\n"
    code += "print({c.name: (c.state, c.fix) for c in _packages()}['torch'])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "('error', \"pip install 'torch>=2.11'\")\n"


@pytest.mark.parametrize(
    ("devices", "cuda", "driver", "state", "word"),
    [
        ([("H100", 80 << 30, "9.0")], "13.0", True, "ok", "H100, 80 GiB, 9.0"),
        ([], None, False, "ok", "none; jobs run on"),
        ([], None, True, "warning", "torch is without CUDA"),
        ([], "13.0", True, "warning", "torch cannot use"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_with_its_cause(
    tmp_path: Path,
    devices: list[tuple[str, int, str]],
    cuda: str | None,
    driver: bool,
    state: str,
    word: str,
) -> None:
    file = tmp_path / "version"
    if driver:
        file.touch()
    found = _accelerator(devices, cuda, file)
    assert (found.state, word in found.text) == (state, True)
    assert (found.fix is None) == (state == "ok")


def test_little_memory_is_a_warning() -> None:
    assert (_memory(3 << 30).state, _memory(5 << 30).state) == ("warning", "ok")


def test_a_port_that_another_program_has_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = ServiceSettings(data=tmp_path, port=port)
        found = _port(settings, serving=False)
        assert (found.state, f"127.0.0.1:{port}" in found.text) == ("warning", True)
        assert "--port 0" in str(found.fix)
        assert _port(settings, serving=True).state == "ok"
    assert _port(settings, serving=False).state == "ok"


def test_a_broker_that_is_not_there_is_an_error_without_its_password() -> None:
    found = _broker("redis://:hidden@127.0.0.1:9/0")
    assert (found.state, found.text) == ("error", "127.0.0.1:9/0 does not answer (ConnectionError)")
