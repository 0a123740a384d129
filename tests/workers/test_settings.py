"""Settings refuse what cannot work or must not run."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from bitmill_workers.settings import Settings


def test_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITMILL_DATA", str(tmp_path))
    monkeypatch.setenv("BITMILL_QUEUES", "gpu-48, gpu-24")
    monkeypatch.setenv("BITMILL_HUB_TOKEN", "")
    monkeypatch.setenv("BITMILL_MODEL_ROOTS", '{"a": "/srv/a"}')
    settings = Settings()
    assert settings.queues == ("gpu-48", "gpu-24")
    assert settings.model_roots == {"a": Path("/srv/a")}
    assert settings.database == f"sqlite:///{tmp_path / 'bitmill.db'}"
    assert settings.embedded
    assert settings.hub_token is None


@pytest.mark.parametrize(
    "values",
    [
        {"queues": ("gpu-7",)},
        {"queues": ()},
        {"lease_s": 10, "renew_s": 6},
        {"database_url": "postgresql+psycopg://u:password@db/x"},
        {"database_url": "postgresql://u:long-enough@db/x"},
        {"database_url": "mysql://u:long-enough@db/x"},
        {"database_url": "nonsense"},
        {"broker_url": "redis://:changeme@redis/0"},
        {"s3_secret_key": "minioadmin"},
        {"webhook_secret": ""},
        {"webhook_secret": "REPLACE-with-openssl-rand-hex-24"},
        {"database_url": "postgresql+psycopg://u:REPLACE-with-openssl-rand-hex-24@db/x"},
    ],
)
def test_default_secrets_and_impossible_values_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**values)


def test_secrets_are_not_shown() -> None:
    settings = Settings(hub_token="hf_canary", webhook_secret="canary")
    assert "canary" not in repr(settings)
    assert "canary" not in settings.model_dump_json()
    with pytest.raises(ValidationError) as refused:
        Settings(hub_token="hf_canary", renew_s=80)
    assert "80" in str(refused.value)
    assert "canary" not in str(refused.value)
