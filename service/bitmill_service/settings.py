"""Settings of the API process: the workers' settings and how HTTP is served.

Read from the environment (prefix BITMILL_) or given by the command line; frozen.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from bitmill_workers.settings import Settings


class ServiceSettings(Settings):
    """What `bitmill serve` and `create_app` can be told; sizes in bytes, times in seconds.

    keys: whether calls need an API key. "auto": unless `host` is loopback and no key was ever made.
    calls_per_minute: of a key that has no limit of its own; downloads are not counted.
    tenant_queued, tenant_running, tenant_bytes: of a tenant whose key has no limit of its own.
    keep_days: how long files of finished jobs are kept, unless their key says otherwise.
    accel_location: an internal location of the nginx in front of this service that is the folder
    `artifacts` below `data`: files are sent by nginx. None: by this service.
    s3_redirect: downloads go straight to the object store, by presigned addresses. False: this
    service sends the files, for clients that cannot reach the store.
    metrics_host, metrics_port: where metrics are served without a key as well; None: nowhere.
    allowed_hosts: names that requests may be sent to; empty accepts all. The embedded service on
    loopback accepts loopback's names only, unless these are set.
    max_body: largest request body; bit-width maps of large models are the largest ones.
    event_poll_s: how often an event stream looks for news.
    max_queued: refuse new jobs (429) while so many wait.
    hub_check_s: how long planning waits for each answer of the Hub.
    skeleton_check_s: how long planning waits for transformers' word on a config.json; 0 never asks.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8737, ge=0, le=65535)
    keys: Literal["auto", "required", "off"] = "auto"
    calls_per_minute: int = Field(default=6000, ge=1)
    tenant_queued: int = Field(default=100, ge=0)
    tenant_running: int | None = Field(default=None, ge=0)
    tenant_bytes: int | None = Field(default=None, ge=0)
    keep_days: float | None = Field(default=None, gt=0)
    accel_location: str | None = Field(default=None, pattern="^/.*/$")
    s3_redirect: bool = True
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    max_body: int = Field(default=16 << 20, ge=1024)
    event_poll_s: float = Field(default=0.5, gt=0)
    max_queued: int = Field(default=1000, ge=1)
    hub_check_s: float = Field(default=5.0, gt=0)
    skeleton_check_s: float = Field(default=10.0, ge=0)

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: object) -> object:
        return tuple(v.strip() for v in value.split(",")) if isinstance(value, str) else value
