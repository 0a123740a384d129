"""Creating, planning, listing, cancelling, retrying and deleting jobs over HTTP."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
from pydantic import SecretStr

from bitmill.errors import ModelError, NumericalError
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.migrate import upgrade
from bitmill_workers.store.tables import DELIVERY_TRIES, outbox
from finished import Stack, spec_json
from serving import serve
from stores import wait_for


def post(http: httpx2.Client, body: Any, **headers: str) -> httpx2.Response:
    return http.post("/v1/jobs", json=body, headers=headers)


def job_count(stack: Stack) -> int:
    return sum(stack.context.jobs.counts().values())


def test_created_job_is_queued_and_found_at_its_location(http: httpx2.Client) -> None:
    answer = post(http, spec_json(label="first"))
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}" == job["links"]["self"]
    found = http.get(answer.headers["location"]).json()
    assert found["state"] == "queued"
    assert found["label"] == "first"
    assert found["spec"]["budget"]["code_bits"] == 3
    assert found["model"] == {"source": "path", "path": "models/tiny", "file": None}
    assert found["queue_position"] >= 0


def test_internal_columns_stay_inside(http: httpx2.Client, stack: Stack) -> None:
    shown = http.get(f"/v1/jobs/{stack.running().id}").json()
    assert not {"token", "owner", "lease_until", "tenant"} & shown.keys()


def test_same_key_and_body_give_the_same_job(http: httpx2.Client, stack: Stack) -> None:
    before = job_count(stack)
    headers = {"Idempotency-Key": "once"}
    first = http.post("/v1/jobs", json=spec_json(), headers=headers)
    again = http.post("/v1/jobs", json=spec_json(), headers=headers)
    assert first.json()["id"] == again.json()["id"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert job_count(stack) == before + 1
    other = http.post("/v1/jobs", json=spec_json(seed=5), headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    assert other.json()["param"] == "Idempotency-Key"


def test_replay_is_found_before_anything_else_is_checked(
    http: httpx2.Client, stack: Stack, models: Path
) -> None:
    shutil.copytree(models / "tiny", models / "fleeting")
    body = spec_json(model={"source": "path", "path": "models/fleeting"})
    headers = {"Idempotency-Key": "fleeting"}
    first = http.post("/v1/jobs", json=body, headers=headers)
    shutil.rmtree(models / "fleeting")
    again = http.post("/v1/jobs", json=body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert http.post("/v1/jobs", json=body).json()["code"] == "model_not_found"


def test_unknown_query_parameter_is_refused_and_creates_nothing(
    http: httpx2.Client, stack: Stack
) -> None:
    before = job_count(stack)
    answer = http.post("/v1/jobs?validate_onyl=true", json=spec_json())
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["param"] == "validate_onyl"
    assert "validate_only" in answer.json()["detail"]
    assert job_count(stack) == before
    assert http.get("/healthz?x=1").status_code == 200


def test_plan_is_shown_and_nothing_created(http: httpx2.Client, stack: Stack) -> None:
    before = job_count(stack)
    answer = http.post("/v1/jobs?validate_only=true", json=spec_json())
    assert answer.status_code == 200
    plan = answer.json()
    assert plan["blocks"] == 2
    assert plan["linears"] == 14
    assert plan["smallest"]["size"] < plan["largest"]["size"]
    assert plan["smallest"]["width"] == 2
    assert plan["estimate"]["largest_size"] == plan["largest"]["size"]
    assert plan["estimate"]["host_bytes"] > 0
    kept, packed = plan["embeddings"]["kept"], plan["embeddings"]["packed"]
    assert kept == 258 * 160 * 4  # tied, below the size from which matrices are narrowed
    assert 258 * 160 < packed["8"] < 258 * 160 * 1.1
    assert packed["4"] < 0.6 * packed["8"]
    assert plan["on_accelerator"]["seconds"] < plan["estimate"]["seconds"]
    assert plan["fused"][0][0] == [
        f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v")
    ]
    assert job_count(stack) == before


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"colour": "red"}, "invalid_spec", "colour"),
        ({"budget": {"bits": 3, "code_bits": 3}}, "invalid_spec", "budget"),
        ({"budget": {}}, "invalid_spec", "budget"),
        ({"budget": {"code_bits": 1.5}}, "impossible_budget", "budget.code_bits"),
        ({"budget": {"size": 1000}}, "impossible_budget", "budget.size"),
        (
            {"model": {"source": "path", "path": "other/tiny"}},
            "path_not_allowed",
            "model.path",
        ),
        (
            {"model": {"source": "path", "path": "models/../etc"}},
            "path_not_allowed",
            "model.path",
        ),
        ({"model": {"source": "path", "path": "models/none"}}, "model_not_found", "model"),
        ({"model": {"source": "upload", "upload_id": "u1"}}, "upload_not_found", "model.upload_id"),
        (
            {"calibration": {"text": {"source": "file", "path": "models/no.txt"}}},
            "text_not_found",
            "calibration.text.path",
        ),
        (
            {"calibration": {"text": {"source": "file", "path": "../secret"}}},
            "path_not_allowed",
            "calibration.text.path",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_specification_is_refused_and_creates_nothing(
    http: httpx2.Client, stack: Stack, changes: dict[str, Any], code: str, param: str | None
) -> None:
    before = job_count(stack)
    for path in ("/v1/jobs", "/v1/jobs?validate_only=true"):
        answer = http.post(path, json=spec_json(**changes))
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert (problem["code"], problem["param"]) == (code, param)
        assert problem["hint"]
        assert problem["request_id"] == answer.headers["x-request-id"]
    assert job_count(stack) == before


def test_short_calibration_file_is_refused(http: httpx2.Client, stack: Stack) -> None:
    root = stack.context.settings.model_roots["models"]
    (root / "short.txt").write_text("too short")
    text = {"source": "file", "path": "models/short.txt"}
    answer = post(http, spec_json(calibration={"text": text, "length": 64, "sequences": 1}))
    assert answer.json()["code"] == "text_too_short"
    assert "9 bytes" in answer.json()["detail"]


def test_list_filters_and_pages_without_gaps(http: httpx2.Client, stack: Stack) -> None:
    made = [stack.queued(label="paged").id for _ in range(5)]
    seen: list[str] = []
    after: str | None = None
    for expected in (2, 2, 1):
        query = {"label": "paged", "limit": "2"} | ({"after": after} if after else {})
        page = http.get("/v1/jobs", params=query).json()
        assert len(page["jobs"]) == expected
        seen += [job["id"] for job in page["jobs"]]
        after = page["next"]
    assert after is None
    assert seen == sorted(made, reverse=True)
    failed = stack.failed(label="filtered").id
    stack.queued(label="filtered")
    query = {"label": "filtered", "state": "failed", "model": "models/tiny"}
    assert [job["id"] for job in http.get("/v1/jobs", params=query).json()["jobs"]] == [failed]
    assert http.get("/v1/jobs", params={"state": "odd"}).json()["code"] == "invalid_request"


def test_cancel_ends_a_queued_job_and_asks_a_running_one(http: httpx2.Client, stack: Stack) -> None:
    queued, running = stack.queued().id, stack.running().id
    assert http.post(f"/v1/jobs/{queued}/cancel").json()["state"] == "cancelled"
    assert http.post(f"/v1/jobs/{running}/cancel").json()["state"] == "cancelling"
    again = http.post(f"/v1/jobs/{queued}/cancel")
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")


def test_cancel_of_a_finished_job_is_a_conflict(http: httpx2.Client, stack: Stack) -> None:
    answer = http.post(f"/v1/jobs/{stack.failed().id}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "job_finished")


def test_progress_is_shown_while_a_job_runs_only(http: httpx2.Client, stack: Stack) -> None:
    job = stack.running()
    progress = {"kind": "progress", "stage": "refine", "done": 3, "total": 30, "unit": "block"}
    assert stack.leases.report(job.id, job.token, [], stage="refine", progress=progress)
    shown = http.get(f"/v1/jobs/{job.id}").json()
    assert shown["stage"] == "refine"
    assert shown["progress"] == {"stage": "refine", "done": 3, "total": 30, "unit": "block"}
    assert stack.leases.fail(job.id, job.token, NumericalError("no luck"))
    assert http.get(f"/v1/jobs/{job.id}").json()["progress"] is None


def test_failed_job_says_why(http: httpx2.Client, stack: Stack) -> None:
    shown = http.get(f"/v1/jobs/{stack.failed().id}").json()
    assert shown["error"] == {
        "kind": "InputError.ModelError",
        "code": "invalid_model",
        "message": "it is broken",
        "param": "model",
        "hint": ModelError.hint,
    }
    assert shown["finished_at"].endswith("Z")


def test_retry_makes_a_child_with_the_same_specification(http: httpx2.Client, stack: Stack) -> None:
    old = stack.failed(seed=7)
    headers = {"Idempotency-Key": "retry-once"}
    answer = http.post(f"/v1/jobs/{old.id}/retry", headers=headers)
    assert answer.status_code == 202
    new = answer.json()
    assert (new["parent_id"], new["state"]) == (old.id, "queued")
    assert new["spec"] == old.spec
    assert http.post(f"/v1/jobs/{old.id}/retry", headers=headers).json()["id"] == new["id"]
    unfinished = http.post(f"/v1/jobs/{stack.queued().id}/retry")
    assert (unfinished.status_code, unfinished.json()["code"]) == (409, "job_not_finished")


def test_delete_removes_a_finished_job_only(http: httpx2.Client, stack: Stack) -> None:
    running, finished = stack.running().id, stack.succeeded().id
    assert http.delete(f"/v1/jobs/{running}").json()["code"] == "job_not_finished"
    assert http.delete(f"/v1/jobs/{finished}").status_code == 204
    gone = http.get(f"/v1/jobs/{finished}")
    assert (gone.status_code, gone.json()["code"]) == (404, "job_not_found")


def test_full_queue_refuses_with_retry_after(stack: Stack, http: httpx2.Client) -> None:
    waiting = stack.context.jobs.counts()["queued"]
    settings = stack.context.settings
    stack.context.settings = settings.model_copy(update={"max_queued": waiting})
    try:
        answer = post(http, spec_json())
    finally:
        stack.context.settings = settings
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_jobs")
    assert answer.headers["retry-after"] == "60"


def test_webhook_is_refused_where_it_cannot_be_called_and_its_delivery_is_shown(
    tmp_path: Path, models: Path
) -> None:
    settings = ServiceSettings(
        data=tmp_path, model_roots={"models": models}, webhook_secret=SecretStr("long-and-random")
    )
    app = create_app(settings)
    context = app.state.context
    upgrade(context.database)
    headers = {"Webhook-URL": "https://hook.invalid/x?token=secret"}
    with serve(app) as url, httpx2.Client(base_url=url, timeout=60) as http:
        for host in (
            "127.0.0.1",
            "[::1]",
            "169.254.169.254",
            "10.0.0.1",
            "2130706433",
            "localhost",
        ):
            inwards = {"Webhook-URL": f"https://{host}/"}
            refused = http.post("/v1/jobs", json=spec_json(), headers=inwards)
            assert (refused.status_code, refused.json()["code"]) == (422, "webhook_refused")
            assert refused.json()["param"] == "Webhook-URL"
        job = http.post("/v1/jobs", json=spec_json(), headers=headers).json()
        assert job["webhook"]["state"] == "waiting"
        path = f"/v1/jobs/{job['id']}"
        http.post(f"{path}/cancel")
        wait_for(lambda: http.get(path).json()["webhook"]["last_error"], "a try")
        shown = http.get(path).json()["webhook"]
        assert (shown["state"], shown["tries"]) == ("delivering", 1)
        assert shown["next_try"]
        assert "does not resolve" in shown["last_error"]
        with context.database.write() as conn:
            conn.execute(sa.update(outbox).values(tries=DELIVERY_TRIES))
        assert http.get(path).json()["webhook"]["state"] == "failed"
        with context.database.write() as conn:
            conn.execute(sa.update(outbox).values(delivered_at=1e9, last_error=None))
        assert http.get(path).json()["webhook"]["state"] == "delivered"
        assert "token=secret" not in http.get(path).text
        assert http.post(f"{path}/retry").json()["webhook"]["state"] == "waiting"
        assert http.get("/v1/jobs").json()["jobs"][0]["webhook"] is None
        assert http.post("/v1/jobs", json=spec_json()).json()["webhook"] is None


def test_webhook_without_a_secret_is_refused_and_priority_is_kept(
    http: httpx2.Client, stack: Stack
) -> None:
    spec = {
        "model": {"source": "path", "path": "models/tiny"},
        "budget": {"code_bits": 4},
        "allocation": {"method": "uniform"},
    }
    refused = http.post("/v1/jobs", json=spec, headers={"Webhook-URL": "https://example.com/"})
    assert (refused.status_code, refused.json()["code"]) == (422, "webhook_refused")
    made = http.post("/v1/jobs?priority=7", json=spec).json()
    assert stack.context.jobs.get(made["id"]).priority == 7
    assert http.post("/v1/jobs?priority=1000", json=spec).status_code == 422
