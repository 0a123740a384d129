"""The deployment files, and the same processes started natively by `scripts/stack`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from bitmill_service.client.client import Client
from native import native_stack
from stores import wait_for
from tiny import tiny_llama

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SPEC = {
    "model": {"source": "path", "path": "models/tiny"},
    "budget": {"code_bits": 4},
    "allocation": {"method": "uniform"},
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stack")
    tiny_llama(folder / "models" / "tiny")
    with native_stack(folder) as found:
        yield found


def finished(url: str, job_id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        job: dict[str, Any] = httpx2.get(f"{url}/v1/jobs/{job_id}").json()
        return job if job["state"] in ("succeeded", "failed", "cancelled") else None

    found = wait_for(look, "the job's end", 60)
    assert found is not None
    return found


def test_job_runs_through_proxy_queue_and_object_store(stack: dict[str, Any]) -> None:
    url = stack["url"]
    answer = httpx2.post(f"{url}/v1/jobs", json=SPEC | {"label": "steps=2"}, timeout=30)
    assert answer.status_code == 202, answer.text
    job = finished(url, answer.json()["id"])
    assert job["state"] == "succeeded", job
    files = httpx2.get(f"{url}/v1/jobs/{job['id']}/files").json()["files"]
    assert len(files) == 4
    for file in files:
        place = f"{url}/v1/jobs/{job['id']}/files/{file['path']}"
        assert httpx2.get(place).status_code == 302
        content = httpx2.get(place, follow_redirects=True).content
        assert hashlib.sha256(content).hexdigest() == file["sha256"]


def test_client_downloads_from_the_object_store_and_goes_on(
    stack: dict[str, Any], tmp_path: Path
) -> None:
    """The signed addresses take `Range`; nothing of the service's is sent along."""
    with Client(stack["url"]) as client:
        job = client.wait(client.submit(SPEC).id, timeout=60)
        files = {file.path: file for file in client.files(job.id).files}
        done = client.download(job.id, tmp_path / "out")
        assert set(done.fetched) == set(files)
        weights = files["model.safetensors"]
        whole = (tmp_path / "out/model.safetensors").read_bytes()
        (tmp_path / "out/model.safetensors").unlink()
        part = tmp_path / "out" / f".model.safetensors.{weights.sha256[:12]}.part"
        part.write_bytes(whole[:400])
        assert client.download(job.id, tmp_path / "out").bytes_fetched == weights.size - 400
        assert (tmp_path / "out/model.safetensors").read_bytes() == whole


def test_a_model_is_uploaded_through_the_proxy_to_either_replica(
    stack: dict[str, Any], tmp_path: Path
) -> None:
    """Its files come to both, and a worker without the folder gets them from the object store."""
    folder = tiny_llama(tmp_path / "mine", seed=3)
    with Client(stack["url"]) as client:
        upload = client.upload(folder)
        assert (upload.state, client.uploads()[-1].id) == ("complete", upload.id)
        model = {"source": "upload", "upload_id": upload.id}
        job = client.wait(client.submit(SPEC | {"model": model}).id, timeout=60)
        assert job.state == "succeeded"
        client.delete_upload(upload.id)


def test_replicas_agree_and_metrics_stay_inside(stack: dict[str, Any]) -> None:
    pages = [httpx2.get(f"{api}/v1/jobs").json() for api in stack["apis"]]
    assert pages[0] == pages[1]
    assert httpx2.get(f"{stack['url']}/metrics").status_code == 403
    assert httpx2.get(f"{stack['url']}/readyz").json()["ready"]


def test_dashboard_and_alerts_use_metrics_that_exist(stack: dict[str, Any]) -> None:
    shown = httpx2.get(f"{stack['apis'][0]}/metrics").text
    known = set(re.findall(r"^# TYPE (\w+)", shown, re.MULTILINE))
    known |= {f"{name}_{part}" for name in known for part in ("bucket", "count", "sum")}
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
    texts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    board = json.loads((DEPLOY / "grafana" / "bitmill.json").read_text())
    texts += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(texts) > 15
    used = {name for text in texts for name in re.findall(r"bitmill_\w+", text)}
    assert used - known == set()


def test_api_logs_json_lines_with_the_request_id(stack: dict[str, Any]) -> None:
    headers = {"X-Request-ID": "follow-me"}
    httpx2.get(f"{stack['apis'][0]}/v1/jobs/absent", headers=headers)

    def line() -> dict[str, Any] | None:
        lines = (Path(stack["data"]) / "api-0.log").read_text().splitlines()
        found = [entry for entry in map(json.loads, lines) if entry.get("request_id")]
        return next((e for e in found if e["request_id"] == "follow-me"), None)

    entry = wait_for(line, "the line")
    assert entry is not None
    assert entry["message"] == "GET /v1/jobs/absent 404"


def test_secrets_do_not_reach_logs(stack: dict[str, Any]) -> None:
    data = Path(stack["data"])
    password = re.findall(r"requirepass (\w+)", (data / "redis" / "redis.conf").read_text())[0]
    logs = list(data.glob("*.log"))
    assert len(logs) >= 6
    assert [log.name for log in logs if password in log.read_text(errors="replace")] == []


def test_boot_fails_on_default_secrets(tmp_path: Path) -> None:
    env = {"BITMILL_DATA": str(tmp_path), "BITMILL_BROKER_URL": "redis://:changeme@127.0.0.1:1/0"}
    run = subprocess.run(
        [sys.executable, "-m", "bitmill_workers.worker"],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode != 0
    assert "default or empty password" in run.stderr


def test_compose_file_is_valid_and_publishes_only_the_proxy() -> None:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("needs the Debian package docker-compose")
    run = subprocess.run(
        [program, "--env-file", str(DEPLOY / "environment.example"), "config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    services = yaml.safe_load(run.stdout)["services"]
    usual = {name: service for name, service in services.items() if not service.get("profiles")}
    assert [name for name, service in usual.items() if service.get("ports")] == ["nginx"]
    for name in ("api", "worker", "prepare"):
        assert services[name]["read_only"], name
        assert services[name]["user"] == "10001:10001"
        assert services[name]["cap_drop"] == ["ALL"]
    assert "HF_TOKEN" not in json.dumps(services["redis"])
    assert services["api"]["environment"]["BITMILL_KEYS"] == "required"
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert len(published) == 3
    assert all("127.0.0.1" in json.dumps(port) for port in published)


def test_images_copy_what_exists() -> None:
    for file in DEPLOY.glob("*.Dockerfile"):
        for line in file.read_text().splitlines():
            if line.startswith("COPY ") and "--from" not in line:
                for name in line.split()[1:-1]:
                    assert (ROOT / name).exists(), f"{file.name}: {name}"
