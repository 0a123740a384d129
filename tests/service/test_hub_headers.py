"""Models on the Hub: refused or planned without their weights, against a Hub on loopback."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from bitmill.errors import ModelError
from bitmill.plan.model_plan import make_plan
from bitmill_service.api.hub_headers import fetch_headers
from bitmill_service.settings import ServiceSettings
from bitmill_workers.job_spec import HubModel, parse_spec
from finished import Stack, spec_json
from hub_server import hub_app
from serving import serve


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[str]:
    root = tmp_path_factory.mktemp("hub")
    (root / "org").mkdir()
    (root / "org/good").symlink_to(models / "tiny")
    (root / "org/pickle").mkdir()
    (root / "org/pickle/pytorch_model.bin").write_bytes(b"\x80\x04.")
    (root / "org/bomb").mkdir()
    (root / "org/bomb/model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with serve(hub_app(root)) as url:
        yield url


@pytest.fixture(autouse=True)
def _hub_settings(stack: Stack, hub: str) -> Iterator[None]:
    before = stack.context.settings
    stack.context.settings = before.model_copy(update={"hub_endpoint": hub})
    yield
    stack.context.settings = before


def body(repo: str, **changes: object) -> dict[str, object]:
    return spec_json(model={"source": "hub", "repo_id": repo, **changes})


def test_missing_repository_revision_and_pickles_are_refused_at_once(
    http: httpx2.Client, stack: Stack
) -> None:
    before = sum(stack.context.jobs.counts().values())
    for spec, code in [
        (body("org/none"), "model_not_found"),
        (body("org/good", revision="v9"), "revision_not_found"),
        (body("org/pickle"), "pickle_refused"),
    ]:
        answer = http.post("/v1/jobs", json=spec)
        assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert sum(stack.context.jobs.counts().values()) == before


def test_silent_hub_is_left_to_the_worker(http: httpx2.Client, stack: Stack) -> None:
    stack.context.settings = stack.context.settings.model_copy(
        update={"hub_endpoint": "http://127.0.0.1:9"}
    )
    assert http.post("/v1/jobs", json=body("org/good")).status_code == 202
    plan = http.post("/v1/jobs?validate_only=true", json=body("org/good"))
    assert (plan.status_code, plan.json()["code"]) == (502, "hub_unreachable")


def test_plan_from_headers_equals_the_plan_of_the_folder(
    hub: str, models: Path, tmp_path: Path
) -> None:
    settings = ServiceSettings(hub_endpoint=hub)
    fetch_headers(HubModel(repo_id="org/good"), settings, tmp_path)
    spec = parse_spec(spec_json())
    assert make_plan(tmp_path, spec) == make_plan(models / "tiny", spec)
    file, source = tmp_path / "model.safetensors", models / "tiny/model.safetensors"
    assert file.stat().st_size == source.stat().st_size
    assert file.read_bytes() != source.read_bytes()


def test_plan_of_a_hub_model_is_answered(http: httpx2.Client) -> None:
    answer = http.post("/v1/jobs?validate_only=true", json=body("org/good"))
    assert (answer.status_code, answer.json()["linears"]) == (200, 14)


def test_enormous_header_is_never_fetched(hub: str, tmp_path: Path) -> None:
    settings = ServiceSettings(hub_endpoint=hub)
    with pytest.raises(ModelError, match="header of"):
        fetch_headers(HubModel(repo_id="org/bomb"), settings, tmp_path)
    with pytest.raises(ModelError, match="whole file"):
        fetch_headers(HubModel(repo_id="org/good", file="x.gguf"), settings, tmp_path)
