"""Exports of jobs: planned from headers, refused by name, written by a runner of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa
import torch
from transformers import AutoModelForCausalLM

from bitmill.errors import SpecError
from bitmill.formats.export_plan import ExportTarget
from bitmill.pipeline.export import Export
from bitmill.plan.fingerprint import Fingerprint
from bitmill_service.client.client import Client
from bitmill_service.client.errors import ServiceError
from bitmill_workers.execution.stop import StopRequest
from bitmill_workers.execution.supervisor import Supervisor
from bitmill_workers.store.retention import leaving
from bitmill_workers.store.tables import jobs
from finished import Stack, spec_json
from tiny import CALIBRATION, tiny_llama
from weights import PackedModel, dequantized_model, pack_model

TOKENS = torch.arange(3, 35)[None]
QUICK: dict[str, Any] = {
    "budget": {"code_bits": 4},
    "allocation": {"method": "uniform"},
    "refinement": {"method": "rtn"},
    "evaluation": {"texts": ["wiki_evaluation"], "sequences": 1, "length": 32},
    "calibration": {
        "text": {"source": "file", "path": "models/text.txt"},
        "sequences": 1,
        "length": 32,
        "held_out": 0,
    },
    "threads": 1,
}


EVEN = {"model": {"source": "path", "path": "models/even"}}


@pytest.fixture(scope="module", autouse=True)
def even(models: Path) -> Path:
    """A model whose sides all formats take, beside a short text."""
    shutil.copy(CALIBRATION, models / "text.txt")
    return tiny_llama(models / "even", hidden_size=128, head_dim=32)


@pytest.fixture(scope="module")
def packed(even: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return pack_model(even, tmp_path_factory.mktemp("packed"), cycle=(3, 4, 2))


@pytest.fixture(scope="module")
def ordered(even: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("ordered")
    return pack_model(even, folder, cycle=(3, 4, 2), order="activation")


@pytest.fixture
def work(stack: Stack) -> Iterator[Callable[[], None]]:
    """Run what is queued, by real runners, until nothing is."""
    supervisor = Supervisor(stack.context.settings, stack.context.database)
    with StopRequest() as stop:

        def run() -> None:
            while supervisor.run_next(stop):
                pass

        yield run


def test_a_plan_says_what_the_written_export_takes(
    stack: Stack, client: Client, packed: PackedModel
) -> None:
    job, before = stack.packed(packed.folder), client.list_jobs(kind="export").jobs
    for target in (
        ExportTarget(format="dequantized", settings={"dtype": "float32"}),
        ExportTarget(format="compressed-tensors"),
        ExportTarget(format="gptq", settings={"fused": False}),
    ):
        told = client.plan_export(job.id, target)
        assert dict(told) == dict(Export.of(packed.folder, target.chosen).report())
    assert client.list_jobs(kind="export").jobs == before


def test_an_export_is_a_job_with_files_of_its_own(
    stack: Stack,
    client: Client,
    http: httpx2.Client,
    packed: PackedModel,
    tmp_path: Path,
    work: Callable[[], None],
) -> None:
    job = stack.packed(packed.folder)
    target = ExportTarget(format="dequantized", settings={"dtype": "float32"})
    told = client.plan_export(job.id, target)
    made = client.export(job.id, target, idempotency_key="once")
    assert client.export(job.id, target, idempotency_key="once").id == made.id
    assert (made.kind, made.state, made.parent_id) == ("export", "queued", job.id)
    work()
    done = client.wait(made.id, timeout=60)
    assert done.result == told.model_dump()
    assert [one.id for one in client.list_jobs(parent_id=job.id).jobs] == [made.id]
    for page in ("/ui/jobs", f"/ui/jobs/{made.id}"):
        assert "as dequantized" in http.get(page).text
        assert "bitmill-vllm" not in http.get(page).text  # the plug-in reads packed folders alone
    client.download(made.id, tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        expected = dequantized_model(packed)(TOKENS).logits
        assert torch.equal(model(TOKENS).logits, expected)
    states = [e.data["state"] for e in client.events(made.id) if e.kind == "state"]
    assert states == ["queued", "running", "finalizing", "succeeded"]
    again = client.retry(made.id)
    assert (again.kind, again.parent_id, again.spec) == ("export", job.id, made.spec)
    stack.context.jobs.request_cancel(again.id)


@pytest.mark.parametrize("name", ["gguf", "gptq", "compressed-tensors"])
def test_a_column_order_is_refused_by_name(
    name: str, stack: Stack, client: Client, ordered: PackedModel
) -> None:
    job = stack.packed(ordered.folder)
    with pytest.raises(SpecError, match=r"allocation\.order: it has no place") as refused:
        client.export(job.id, ExportTarget(format=name))
    assert (refused.value.code, refused.value.param) == ("format_refuses", "allocation.order")
    assert client.list_jobs(parent_id=job.id).jobs == []


def test_what_cannot_be_exported_is_said(
    stack: Stack, http: httpx2.Client, packed: PackedModel
) -> None:
    job = stack.packed(packed.folder)
    body = {"format": "dequantized"}
    waiting = stack.queued()
    cases = {
        waiting.id: (409, "job_not_finished"),
        stack.failed().id: (404, "no_such_output"),
        "nowhere": (404, "job_not_found"),
    }
    for job_id, expected in cases.items():
        answer = http.post(f"/v1/jobs/{job_id}/exports", json=body)
        assert (answer.status_code, answer.json()["code"]) == expected
    stack.context.jobs.request_cancel(waiting.id)
    unknown = http.post(f"/v1/jobs/{job.id}/exports", json={"format": "nothing"})
    assert (unknown.status_code, unknown.json()["code"]) == (422, "invalid_spec")
    assert unknown.json()["detail"].startswith("body: format 'nothing' is unknown")
    many = http.post("/v1/jobs", json=spec_json(exports=[{"format": "gguf"}] * 17))
    assert (many.status_code, many.json()["param"]) == (422, "exports")
    made = http.post(f"/v1/jobs/{job.id}/exports", json=body).json()["id"]
    stack.context.jobs.request_cancel(made)
    twice = http.post(f"/v1/jobs/{made}/exports", json=body)
    assert (twice.status_code, twice.json()["code"]) == (422, "not_packed")


def test_an_export_of_files_that_are_gone_fails_by_name(
    stack: Stack, client: Client, packed: PackedModel, work: Callable[[], None]
) -> None:
    job = stack.packed(packed.folder)
    made = client.export(job.id, ExportTarget(format="dequantized"))
    assert leaving(stack.context.database, None) == ()
    with pytest.raises(ServiceError, match=f"job {made.id} needs job {job.id}"):
        client.delete(job.id)
    with stack.context.database.write() as conn:  # a database from before, or an operator
        conn.execute(sa.delete(jobs).where(jobs.c.id == job.id))
    work()
    failed = client.get(made.id)
    assert failed.error is not None
    assert (failed.state, failed.error.code) == ("failed", "no_such_output")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"allocation": {"order": "activation"}}, "allocation.order"),
        ({"allocation": {"widths": [2, 3, 8]}}, "allocation.widths"),
        ({"allocation": {"embeddings": "quantize"}}, "embed_tokens"),
        ({"code": "trellis"}, "'trellis'"),
        ({"exports": [{"format": "bitmill-1"}]}, "'bitmill-1' itself"),
    ],
)
def test_what_a_target_has_no_place_for_is_refused_at_submission(
    changes: dict[str, Any], problem: str, client: Client
) -> None:
    spec = spec_json(exports=[{"format": "gguf"}], allocation={}, **EVEN) | changes
    with pytest.raises(SpecError, match=problem):
        client.submit(spec)
    with pytest.raises(SpecError, match=problem):
        client.plan(spec)


def test_a_plan_with_exports_has_their_sizes(client: Client) -> None:
    spec = spec_json(exports=[{"format": "gptq"}, {"format": "dequantized"}], allocation={}, **EVEN)
    plan = client.plan(spec)
    packed, plain = plan.exports
    assert (packed.format, plain.format) == ("gptq", "dequantized")
    assert packed.smallest < packed.largest
    assert plain.smallest == plain.largest
    assert plan.smallest.size < plain.smallest


OWN = ["Bitmill", "transformers with bitmill.hf"]
ENGINES = ["vLLM with bitmill-vllm", "SGLang with bitmill-sglang"]


@pytest.mark.parametrize(
    ("changes", "engines"),
    [
        ({}, ENGINES),
        ({"code": "trellis"}, ENGINES),
        ({"budget": {"bits": 3.5}, "allocation": {"outliers": [1]}}, []),
        ({"allocation": {"keep": ["model.layers.0.self_attn.v_proj"]}}, []),
        ({"allocation": {"keep": ["model.layers.0.mlp.down_proj"]}}, ENGINES),
    ],
    ids=["affine", "trellis", "outliers", "of q, k and v one kept", "a whole layer kept"],
)
def test_a_plan_names_the_runtimes_that_read_the_result(
    changes: dict[str, Any], engines: list[str], client: Client
) -> None:
    exports = [{"format": "dequantized"}]
    plan = client.plan(spec_json(exports=exports, allocation={}, **EVEN) | changes)
    assert plan.runtimes == [*OWN, *engines]
    assert plan.exports[0].runtimes == ["transformers", "vLLM"]


@pytest.mark.parametrize(
    ("target", "widths", "told"),
    [
        ({"format": "gguf"}, None, ["llama.cpp", "transformers"]),
        ({"format": "mlx"}, None, ["mlx-lm"]),
        ({"format": "gptq"}, [4, 8], ["transformers"]),
        ({"format": "gptq", "settings": {"symmetric": True}}, [2, 3, 4], ["transformers"]),
        ({"format": "gptq", "settings": {"symmetric": True}}, [3, 6], ["transformers", "vLLM"]),
        ({"format": "compressed-tensors"}, None, ["vLLM"]),
        (
            {"format": "compressed-tensors", "settings": {"symmetric": True}},
            None,
            ["transformers", "vLLM"],
        ),
    ],
)
def test_a_plan_names_the_runtimes_that_read_an_export(
    target: dict[str, Any], widths: list[int] | None, told: list[str], client: Client
) -> None:
    allocation = {} if widths is None else {"widths": widths}
    plan = client.plan(
        spec_json(budget={"bits": 4.5}, exports=[target], allocation=allocation, **EVEN)
    )
    assert plan.exports[0].runtimes == told


def test_a_job_starts_the_exports_that_it_names(
    client: Client, work: Callable[[], None], models: Path
) -> None:
    exports = [{"format": "compressed-tensors", "settings": {"symmetric": True}}]
    job = client.submit(spec_json(**QUICK, exports=exports, label="both"))
    assert job.spec["allocation"]["order"] == "natural"
    work()
    done = client.wait(job.id, timeout=60)
    (made,) = client.list_jobs(parent_id=job.id).jobs
    assert (made.kind, made.state, made.label) == ("export", "succeeded", "both")
    told = [event.data for event in client.events(job.id) if event.kind == "export"]
    assert told == [{"job_id": made.id, "format": "compressed-tensors"}]
    plan = client.plan(spec_json(**QUICK, exports=exports))
    assert made.result is not None
    assert done.result is not None
    sizes = plan.exports[0]
    assert sizes.smallest <= made.result["file_bytes"] <= sizes.largest
    own = Fingerprint.of_folder(models / "tiny", weights=True)
    for half in (own.shape, own.weights):
        (kept,) = client.maps(model=half)
        assert client.stored_map(kept.id) == client.bit_width_map(job.id)
    assert {"config.json", "model.safetensors"} <= {f.path for f in client.files(made.id).files}
