"""Settings of every process that touches jobs, read from the environment (prefix BITMILL_).

The embedded service needs none of them: the data folder alone decides where the database, the
broker's files, work and artifacts lie. Production sets the database, the broker and the storage.
"""

from __future__ import annotations

import base64
import os
import socket
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from bitmill.config.device import checked_name

TIERS = ("cpu", "gpu-24", "gpu-48", "gpu-80", "gpu-180")
"""Queues by accelerator memory in GB, ascending; a worker serves its own and smaller ones."""
SECRET_SETTINGS = (
    *("HUB_TOKEN", "PUSH_KEY", "WEBHOOK_SECRET", "S3_ACCESS_KEY", "S3_SECRET_KEY"),
    *("DATABASE_URL", "BROKER_URL"),
)
"""Settings that open something."""
_DATABASES = ("sqlite", "postgresql+psycopg")
_DEFAULT_SECRETS = frozenset(
    {
        "",
        "bitmill",
        "change-me",
        "changeme",
        "minioadmin",
        "password",
        "postgres",
        "redis",
        "secret",
    }
)


def _is_default(secret: str) -> bool:
    """True for well-known words and for what deploy/environment.example asks to replace."""
    return secret.lower() in _DEFAULT_SECRETS or secret.lower().startswith("replace")


class Settings(BaseSettings):
    """Everything that a worker or the API process can be told; times in seconds, sizes in bytes.

    route_by_memory: send a job to the smallest accelerator tier that its plan fits on.
    lease_s: how long a claim lasts without renewal; a lost worker's job runs again after it.
    renew_s: how often the supervisor renews its lease.
    poll_s: how often it reports progress and looks for a cancel.
    stall_s: without any progress for this long the runner's stacks are dumped and the job fails.
    hub_patience_s: a download ends when the Hub has sent nothing for so long.
    stop_grace_s: how long a stopping worker waits for a job that is just being published.
    collect_s: how often files of dead attempts are looked for.
    s3_public_endpoint: the object store's address as clients see it, for download addresses.
    host_bytes: host memory that a job may take; hidden states past it wait in files.
    runner_network: "isolate" cuts the runner off from the network, or refuses to run it.
    hub_cache_bytes: the cache of Hub repositories is kept below this.
    keep_bytes: what results of a tenant may take before the oldest go, where its keys do not say.
    upload_open_s: an upload that got no part for so long is dropped.
    upload_keep_s: a complete upload is kept for so long, and while an unfinished job names it.
    presign_s: how long a download address of the object store is good for starting a download.
    push_key: 32 bytes in base64 that tokens of pushes are encrypted under until these have ended;
    without it no push is taken.
    webhook_private: allow webhooks to private addresses and without TLS; for tests.
    """

    model_config = SettingsConfigDict(
        env_prefix="BITMILL_", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    data: Path = Path("bitmill-data")
    database_url: str | None = None
    broker_url: str | None = None
    model_roots: dict[str, Path] = {}
    hub_endpoint: str | None = None
    hub_token: SecretStr | None = None
    hub_patience_s: float = Field(default=900.0, gt=0)

    worker_name: str = Field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    queues: Annotated[tuple[str, ...], NoDecode] = TIERS
    route_by_memory: bool = False
    device: str = "auto"
    threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    runner_module: str = "bitmill_workers.execution.runner"

    lease_s: float = Field(default=90.0, gt=0)
    renew_s: float = Field(default=20.0, gt=0)
    poll_s: float = Field(default=1.0, gt=0)
    stall_s: float = Field(default=3600.0, gt=0)
    stop_grace_s: float = Field(default=5.0, ge=0)
    resend_s: float = Field(default=60.0, gt=0)
    reconcile_s: float = Field(default=5.0, gt=0)
    crash_retries: int = Field(default=1, ge=0)
    lost_retries: int = Field(default=5, ge=0)
    handback_retries: int = Field(default=100, ge=0)
    log_bytes: int = Field(default=4 << 20, ge=1024)
    runner_network: Literal["keep", "isolate"] = "keep"
    runner_file_bytes: int | None = Field(default=None, ge=1 << 20)
    host_bytes: int | None = Field(default=None, ge=1 << 30)
    collect_s: float = Field(default=60.0, gt=0)
    s3_bucket: str | None = None
    s3_endpoint: str | None = None
    s3_public_endpoint: str | None = None
    s3_region: str = "us-east-1"
    s3_prefix: str = "bitmill"
    s3_access_key: str | None = None
    s3_secret_key: SecretStr | None = None
    hub_cache_bytes: int | None = Field(default=None, ge=0)
    keep_bytes: int | None = Field(default=None, ge=1)
    upload_open_s: float = Field(default=86400.0, gt=0)
    upload_keep_s: float = Field(default=604800.0, gt=0)
    presign_s: int = Field(default=900, ge=1, le=604800)
    webhook_secret: SecretStr | None = None
    push_key: SecretStr | None = None
    webhook_private: bool = False
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("queues", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(v.strip() for v in value.split(",")) if isinstance(value, str) else value

    @field_validator("queues")
    @classmethod
    def _known(cls, queues: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [q for q in queues if q not in TIERS]
        if unknown or not queues:
            raise ValueError(f"queues {list(queues)} must be a non-empty subset of {list(TIERS)}")
        return queues

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        return device if device == "auto" else checked_name(device)

    @field_validator("hub_token", "push_key", "s3_public_endpoint", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        """Compose files pass what is not set as an empty string."""
        return value or None

    @field_validator("s3_secret_key", "webhook_secret")
    @classmethod
    def _real_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and _is_default(secret.get_secret_value()):
            raise ValueError("is a default or empty secret: set one of your own")
        return secret

    @field_validator("push_key")
    @classmethod
    def _whole_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None:
            try:
                size = len(base64.b64decode(key.get_secret_value(), validate=True))
            except ValueError:
                size = 0
            if size != 32:
                raise ValueError("is not 32 bytes in base64: use `openssl rand -base64 32`")
        return key

    @field_validator("database_url", "broker_url")
    @classmethod
    def _real_password(cls, url: str | None) -> str | None:
        password = urlsplit(url).password if url else None
        if password is not None and _is_default(password):
            raise ValueError("has a default or empty password: set one of your own")
        return url

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, url: str | None) -> str | None:
        scheme, found, _ = (url or "sqlite://").partition("://")
        if not found or scheme not in _DATABASES:
            raise ValueError(
                "is no address of a database that is known: give "
                "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, or leave it out for SQLite in "
                "the data folder"
            )
        return url

    @model_validator(mode="after")
    def _lease_outlives_renewal(self) -> Settings:
        if self.renew_s * 2 > self.lease_s:
            raise ValueError(
                f"renew_s {self.renew_s:g} must be at most half of lease_s {self.lease_s:g}"
            )
        return self

    @property
    def database(self) -> str:
        """SQLAlchemy URL; SQLite in the data folder unless BITMILL_DATABASE_URL is set."""
        return self.database_url or f"sqlite:///{self.data.resolve() / 'bitmill.db'}"

    @property
    def broker(self) -> str:
        """Celery broker URL; files in the data folder unless BITMILL_BROKER_URL is set."""
        return self.broker_url or "filesystem://localhost"

    @property
    def embedded(self) -> bool:
        """True where the broker is the data folder, which allows exactly one worker."""
        return self.broker.startswith("filesystem")

    def job_folder(self, job_id: str) -> Path:
        """Stage cache and scratch files of a job; survives its attempts."""
        return self.data / "jobs" / job_id

    def sweep_folder(self, sweep_id: str) -> Path:
        """Stages that the jobs of a sweep share, until the last of them has ended."""
        return self.data / "sweeps" / sweep_id

    @property
    def artifacts_folder(self) -> Path:
        """Published files: `<job id>/<token>/...`."""
        return self.data / "artifacts"

    @property
    def profiles_folder(self) -> Path:
        """Sensitivity profiles: `<profile id>/...`."""
        return self.data / "profiles"

    @property
    def uploads_folder(self) -> Path:
        """Uploaded folders: `<upload id>/...`, `<upload id>.open/...` while parts come."""
        return self.data / "uploads"

    @property
    def hub_cache(self) -> Path:
        """Downloaded model repositories in the Hub client's own layout."""
        return self.data / "hub"
