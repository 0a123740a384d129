"""Health, readiness, metrics and the API's own description."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.migrate import upgrade
from finished import Stack
from serving import serve


def samples(http: httpx2.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_a_method_that_a_client_made_up_is_no_label(http: httpx2.Client) -> None:
    assert http.request("BREW", "/healthz").status_code == 405
    methods = {dict(labels).get("method") for _, labels in samples(http)}
    assert "other" in methods
    assert "BREW" not in methods


def test_process_and_database_are_ready(http: httpx2.Client) -> None:
    assert http.get("/healthz").json()["status"] == "ok"
    ready = http.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["checks"]["database"] == "ok"


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def test_a_full_disk_is_not_ready_until_it_has_room(small_disk: Path) -> None:
    app = create_app(ServiceSettings(data=small_disk))
    upgrade(app.state.context.database)
    with serve(app) as url, httpx2.Client(base_url=url, timeout=60) as http:
        refused = http.get("/readyz")
        assert (refused.status_code, refused.json()["ready"]) == (503, False)
        checks = refused.json()["checks"]
        assert checks["database"] == "ok"
        assert re.match("[12] MiB are free in the data folder, 64 MiB are needed: ", checks["disk"])
        assert http.get("/healthz").status_code == 200
        remount(small_disk, "size=80m")
        assert http.get("/readyz").json()["checks"]["disk"] == "ok"
        assert http.get("/readyz").status_code == 200


def test_a_disk_that_can_only_be_read_is_not_ready(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "first").mkdir()
    data = tmp_path / "data"
    data.symlink_to(tmp_path / "first")
    app = create_app(ServiceSettings(data=data))
    upgrade(app.state.context.database)
    remount(small_disk, "size=80m,ro")
    with serve(app) as url, httpx2.Client(base_url=url, timeout=60) as http:
        assert http.get("/readyz").status_code == 200
        data.unlink()
        data.symlink_to(small_disk)
        refused = http.get("/readyz")
    assert refused.status_code == 503
    assert refused.json()["checks"]["disk"] == "the data folder cannot be written to"


def test_missing_and_live_workers_are_reported(http: httpx2.Client, stack: Stack) -> None:
    assert "none live" in http.get("/readyz").json()["checks"]["workers"]
    catalog = stack.context.catalog
    catalog.beat("w1", host="h", queues=("cpu",), device="cpu", version="1")
    assert http.get("/readyz").json()["checks"]["workers"] == "1 live"
    assert samples(http)["bitmill_workers_live", ()] == 1
    catalog.leave("w1")


def test_metrics_count_jobs_and_requests_by_route(http: httpx2.Client, stack: Stack) -> None:
    before = samples(http).get(("bitmill_jobs", (("state", "failed"),)), 0)
    job = stack.failed()
    route = (("method", "GET"), ("route", "/v1/jobs/{job_id}"), ("status", "200"))
    seen = samples(http).get(("bitmill_http_request_seconds_count", route), 0)
    http.get(f"/v1/jobs/{job.id}")
    now = samples(http)
    assert now["bitmill_jobs", (("state", "failed"),)] == before + 1
    assert now["bitmill_http_request_seconds_count", route] == seen + 1
    assert not any(job.id in str(labels) for _, labels in now)


def test_description_covers_the_routes(http: httpx2.Client) -> None:
    described = http.get("/openapi.json").json()
    assert {
        "/v1/jobs",
        "/v1/jobs/{job_id}",
        "/v1/jobs/{job_id}/cancel",
        "/v1/jobs/{job_id}/retry",
        "/v1/jobs/{job_id}/events",
        "/v1/jobs/{job_id}/logs",
        "/v1/jobs/{job_id}/bit-width-map",
        "/v1/jobs/{job_id}/report",
        "/v1/jobs/{job_id}/files",
        "/v1/jobs/{job_id}/files/{path}",
        "/v1/profiles",
        "/v1/profiles/{profile_id}",
        "/v1/profiles/{profile_id}/allocate",
        "/v1/bit-width-maps",
        "/healthz",
        "/readyz",
    } <= described["paths"].keys()
    assert "JobSpec" in described["components"]["schemas"]
    assert http.get("/docs").status_code == 200
