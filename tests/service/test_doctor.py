"""What `bitmill doctor` finds on good and bad ground."""

from __future__ import annotations

from pathlib import Path

from bitmill_service.cli.doctor import Check, _database, _disk, _hub, _packages, _service
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
    assert (found.state, "bitmill db upgrade" in found.text) == ("error", True)


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
