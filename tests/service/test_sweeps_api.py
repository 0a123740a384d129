"""Sweeps over HTTP."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from bitmill.results import QualityRow, TextQuality
from bitmill_service.client.client import Client
from bitmill_service.client.errors import ServiceError
from finished import Stack, spec_json
from stores import claim


def sweep_json(**axes: list[Any]) -> dict[str, Any]:
    grid = {name.replace("__", "."): values for name, values in axes.items()}
    return {"label": "study", "job": spec_json(), "grid": grid or {"budget.code_bits": [3, 4]}}


def finish(stack: Stack, job_id: str) -> None:
    """Let a queued job succeed with a report."""
    job = claim(stack.leases, job_id)
    text = TextQuality(windows=1, tokens=64, perplexity=21.5, perplexity_se=0.1)
    rows = [
        QualityRow(method="source", texts={"wiki": text}),
        QualityRow(method="uniform gptq", bits=3.1, size=2_000_000, texts={"wiki": text}),
    ]
    quality = {
        "schema_version": 1,
        "rows": [row.model_dump(mode="json") for row in rows],
        "seconds": {"profile": 2.0, "refine": 1.5},
    }
    assert stack.leases.finalize(job.id, job.token)
    assert stack.leases.finish(job.id, job.token, {"quality": quality}, [])


def test_a_sweep_is_its_jobs_and_shows_them_as_they_come(stack: Stack, client: Client) -> None:
    view = client.submit_sweep(sweep_json(budget__code_bits=[3, 4], seed=[0, 1]))
    assert (view.finished, view.counts, view.axes) == (
        False,
        {"queued": 4},
        ["budget.code_bits", "seed"],
    )
    assert view.cells is not None
    assert [cell.values for cell in view.cells][1] == {"budget.code_bits": 3, "seed": 1}
    jobs = [cell.job_id for cell in view.cells]
    job = client.get(str(jobs[2]))
    assert (job.sweep_id, job.cell, job.label) == (view.id, 3, "study")
    finish(stack, job.id)
    found = client.sweep(view.id)
    assert found.cells is not None
    done = found.cells[2]
    assert done.quality is not None
    assert (done.state, done.quality.bits, done.alone_s) == ("succeeded", 3.1, 3.5)
    (listed,) = client.sweeps(limit=1).sweeps
    assert (listed.counts, listed.cells) == ({"queued": 3, "succeeded": 1}, None)
    rows = client.sweep_table(view.id, "csv").splitlines()
    assert len(rows) == 5
    assert rows[3].startswith("3,4,0,succeeded,3.1,")
    assert client.sweep_table(view.id, "markdown").startswith("| cell | budget.code_bits |")
    assert "polyline" in client.sweep_plot(view.id)


def test_a_failed_or_deleted_cell_stops_nothing_and_a_retry_takes_its_place(
    stack: Stack, client: Client
) -> None:
    view = client.submit_sweep(sweep_json())
    assert view.cells is not None
    first, second = (str(cell.job_id) for cell in view.cells)
    client.cancel(first)
    finish(stack, second)
    assert client.sweep(view.id).finished
    again = client.retry(first)
    found = client.sweep(view.id)
    assert found.cells is not None
    assert (found.finished, found.cells[0].job_id) == (False, again.id)
    client.cancel(again.id)
    client.delete(second)
    assert client.sweep(view.id).counts == {"cancelled": 1, "deleted": 1}
    client.delete_sweep(view.id)
    with pytest.raises(ServiceError, match="no sweep"):
        client.sweep(view.id)
    with pytest.raises(ServiceError, match="no job"):
        client.get(first)


def test_cancel_asks_every_job(client: Client) -> None:
    view = client.submit_sweep(sweep_json())
    cancelled = client.cancel_sweep(view.id)
    assert (cancelled.finished, cancelled.counts) == (True, {"cancelled": 2})
    with pytest.raises(ServiceError) as none:
        client.sweep_plot(view.id)
    assert none.value.code == "no_plot_yet"


def test_a_key_makes_one_sweep(http: httpx2.Client) -> None:
    headers = {"Idempotency-Key": "only-one-sweep"}
    first, second = (http.post("/v1/sweeps", json=sweep_json(), headers=headers) for _ in range(2))
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["Idempotency-Replayed"] == "true"
    other = http.post("/v1/sweeps", json=sweep_json(seed=[1]), headers=headers)
    assert other.json()["code"] == "idempotency_mismatch"


@pytest.mark.parametrize(
    ("body", "code", "word"),
    [
        (
            sweep_json(budget__code_bits=[3, 0.5]),
            "impossible_budget",
            "asked for by cell 2 (budget.c",
        ),
        (sweep_json(budget__code_bits=[3, -3]), "invalid_spec", "cell 2"),
        (sweep_json(seed=[]), "invalid_spec", "no values"),
        (sweep_json(seed=list(range(300))), "invalid_spec", "300 cells"),
        ({"job": {}}, "invalid_spec", "grid"),
    ],
)
def test_one_bad_cell_refuses_the_sweep_and_creates_nothing(
    stack: Stack, http: httpx2.Client, body: dict[str, Any], code: str, word: str
) -> None:
    before = stack.context.jobs.counts()
    answer = http.post("/v1/sweeps", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert word in answer.json()["detail"]
    assert stack.context.jobs.counts() == before


def test_unknown_sweeps_and_formats_are_told(http: httpx2.Client) -> None:
    answer = http.get("/v1/sweeps/none")
    assert (answer.status_code, answer.json()["code"]) == (404, "sweep_not_found")
    assert http.get("/v1/sweeps/none/table?format=xls").status_code == 422
    unfinished = http.post("/v1/sweeps", json=sweep_json()).json()["id"]
    answer = http.delete(f"/v1/sweeps/{unfinished}")
    assert (answer.status_code, answer.json()["code"]) == (409, "sweep_not_finished")
