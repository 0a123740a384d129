"""Models on the Hub: refused or planned without their weights, against a Hub on loopback."""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import Request, Response
from starlette.middleware.base import RequestResponseEndpoint

from bitmill.errors import ModelError
from bitmill.io.gguf import read_gguf_header
from bitmill.pipeline import admission
from bitmill.plan.gguf_models import read_model
from bitmill.plan.model_plan import make_plan
from bitmill.plan.source_model import SourceModel, read_source
from bitmill_service.api.hub_headers import fetch_headers
from bitmill_service.settings import ServiceSettings
from bitmill_workers.execution.inputs import planning_config
from bitmill_workers.job_spec import HubModel, parse_spec
from finished import MAP, Stack, spec_json
from gguf_files import write_gguf
from hub_server import hub_app
from serving import serve
from tiny import tiny_llama, tiny_opt


@dataclass
class Hub:
    """A Hub on loopback. seen: paths asked for. faults: status of the files of a name."""

    url: str
    seen: list[str]
    faults: dict[str, int]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    (root / "org").mkdir()
    (root / "org/good").symlink_to(models / "tiny")
    (root / "org/pickle").mkdir()
    (root / "org/pickle/pytorch_model.bin").write_bytes(b"\x80\x04.")
    (root / "org/bomb").mkdir()
    (root / "org/bomb/model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    tiny_opt(root / "org/opt")
    (root / "org/renamed").mkdir()
    shutil.copy(models / "tiny/config.json", root / "org/renamed")
    shutil.copy(models / "tiny/model.safetensors", root / "org/renamed/weights.safetensors")
    (root / "org/gguf").mkdir()
    (root / "org/gguf/model.gguf").write_bytes(gguf_file())
    (root / "org/gguf/short.gguf").write_bytes(gguf_file()[:900_000])
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    llama3 = tiny_llama(tmp_path_factory.mktemp("llama3") / "m", rope_parameters=rope)
    write_gguf(root / "org/gguf/llama3.gguf", llama3)
    app = hub_app(root)
    found = Hub("", [], {})

    @app.middleware("http")
    async def watch(request: Request, call_next: RequestResponseEndpoint) -> Response:
        found.seen.append(request.url.path)
        name = request.url.path.rpartition("/")[2]
        if name not in found.faults:
            return await call_next(request)
        if found.faults[name] == 200:
            return Response(b"whole", 200)
        return Response(status_code=found.faults[name])

    with serve(app) as found.url:
        yield found


@pytest.fixture
def hub(served: Hub) -> Iterator[str]:
    served.seen.clear()
    yield served.url
    served.faults.clear()


def gguf_file() -> bytes:
    """A GGUF file of a tiny Llama with a vocabulary of 1.4 MB; all weights are 0, in Q4_0."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    numbers = {
        "context_length": 512,
        "embedding_length": 128,
        "block_count": 1,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }
    settings = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    settings += [
        text(f"llama.{key}") + struct.pack("<II", 4, value) for key, value in numbers.items()
    ]
    eps = struct.pack("<If", 6, 1e-6)
    settings.append(text("llama.attention.layer_norm_rms_epsilon") + eps)
    words = 100_000
    vocabulary = b"".join(text(f"{word:06}") for word in range(words))
    settings.append(text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, words) + vocabulary)
    shapes = {"token_embd": (words, 128), "output_norm": (128,)}
    shapes |= {f"blk.0.{name}": (128,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {"blk.0.attn_q": (128, 128), "blk.0.attn_output": (128, 128)}
    shapes |= {"blk.0.attn_k": (64, 128), "blk.0.attn_v": (64, 128)}
    shapes |= {"blk.0.ffn_gate": (256, 128), "blk.0.ffn_up": (256, 128)}
    shapes["blk.0.ffn_down"] = (128, 256)
    tensors, end = [], 0
    for name, shape in shapes.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        tensors.append(text(f"{name}.weight") + sizes + struct.pack("<IQ", 2, end))
        end += -(-math.prod(shape) // 32 * 18 // 32) * 32
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings))
    return start + b"".join(settings) + b"".join(tensors) + bytes(end + 32)


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
    spec = planning_config(parse_spec(spec_json()), None)
    assert make_plan(tmp_path, spec) == make_plan(models / "tiny", spec)
    file, source = tmp_path / "model.safetensors", models / "tiny/model.safetensors"
    assert file.stat().st_size == source.stat().st_size
    assert file.read_bytes() != source.read_bytes()


def test_rotary_factors_of_a_gguf_file_come_with_its_header(hub: str, tmp_path: Path) -> None:
    fetch_headers(
        HubModel(repo_id="org/gguf", file="llama3.gguf"),
        ServiceSettings(hub_endpoint=hub),
        tmp_path,
    )
    found = read_model(read_gguf_header(tmp_path / "llama3.gguf"))
    assert found.config["rope_parameters"]["rope_type"] == "llama3"
    spec = planning_config(parse_spec(spec_json()), None)
    assert make_plan(tmp_path, spec, gguf="llama3.gguf").block_count == 2


def test_plan_of_a_hub_model_is_answered(http: httpx2.Client) -> None:
    answer = http.post("/v1/jobs?validate_only=true", json=body("org/good"))
    assert (answer.status_code, answer.json()["linears"]) == (200, 14)


def test_enormous_header_is_never_fetched(hub: str, tmp_path: Path) -> None:
    settings = ServiceSettings(hub_endpoint=hub)
    with pytest.raises(ModelError, match="header of"):
        fetch_headers(HubModel(repo_id="org/bomb"), settings, tmp_path)


def both(http: httpx2.Client, spec: dict[str, object]) -> tuple[int, str | None]:
    """Status and code with which a job is rehearsed and submitted, which must be the same."""
    rehearsed = http.post("/v1/jobs?validate_only=true", json=spec)
    submitted = http.post("/v1/jobs", json=spec)
    found = submitted.status_code, submitted.json().get("code")
    if submitted.status_code == 202:
        assert rehearsed.status_code == 200
    else:
        assert (rehearsed.status_code, rehearsed.json()["code"]) == found
        assert rehearsed.json()["detail"] == submitted.json()["detail"]
        assert rehearsed.json()["param"] == submitted.json()["param"]
    return found


GGUF = {"source": "hub", "repo_id": "org/gguf", "file": "model.gguf"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"budget": {"code_bits": 1.5}}, "impossible_budget"),
        ({"budget": {"size": 1000}}, "impossible_budget"),
        ({"budget": {"bits": 1.9}, "allocation": {"method": "sba"}}, "impossible_budget"),
        (
            {
                "model": {"source": "hub", "repo_id": "org/opt"},
                "calibration": {"length": 4096},
            },
            "length_exceeds_model",
        ),
        (
            {
                "model": {"source": "hub", "repo_id": "org/opt"},
                "calibration": {"length": 64},
                "evaluation": {"length": 4096},
            },
            "length_exceeds_model",
        ),
        ({"model": {"source": "hub", "repo_id": "org/bomb"}}, "header_too_large"),
        ({"model": {"source": "hub", "repo_id": "org/renamed"}}, "missing_file"),
        ({"model": GGUF, "budget": {"code_bits": 1.5}}, "impossible_budget"),
        ({"model": GGUF | {"file": "short.gguf"}}, "bad_gguf"),
        ({"model": GGUF | {"file": "none.gguf"}}, "file_not_found"),
        ({"model": GGUF}, None),
    ],
)
def test_submission_and_rehearsal_give_the_same_answer(
    http: httpx2.Client, stack: Stack, changes: dict[str, object], code: str | None
) -> None:
    before = sum(stack.context.jobs.counts().values())
    status = 202 if code is None else 422
    assert both(http, body("org/good") | changes) == (status, code)
    assert sum(stack.context.jobs.counts().values()) == before + (code is None)


def test_map_that_does_not_fit_is_refused_for_a_hub_model_too(http: httpx2.Client) -> None:
    allocation = {"method": "map", "map": {"source": "inline", "map": MAP}}
    status, code = both(http, body("org/good") | {"allocation": allocation})
    assert (status, code) == (422, "invalid_format")


def test_retry_of_a_hub_job_is_checked_as_its_submission_was(
    http: httpx2.Client, stack: Stack
) -> None:
    model = {"source": "hub", "repo_id": "org/good"}
    old = stack.failed(model=model, budget={"code_bits": 1.5})
    answer = http.post(f"/v1/jobs/{old.id}/retry")
    assert (answer.status_code, answer.json()["code"]) == (422, "impossible_budget")


@pytest.mark.parametrize("status", [200, 404, 429, 500, 503])
def test_header_that_does_not_come_is_no_ground_for_refusal(
    http: httpx2.Client, served: Hub, status: int
) -> None:
    served.faults["model.safetensors"] = status
    impossible = body("org/good") | {"budget": {"code_bits": 1.5}}
    assert http.post("/v1/jobs", json=impossible).status_code == 202
    rehearsed = http.post("/v1/jobs?validate_only=true", json=impossible)
    assert (rehearsed.status_code, rehearsed.json()["code"]) == (502, "hub_unreachable")


def test_files_that_the_hub_refuses_are_refused(http: httpx2.Client, served: Hub) -> None:
    served.faults["model.safetensors"] = 403
    assert both(http, body("org/good")) == (422, "model_gated")


def test_one_submission_asks_for_every_header_once(http: httpx2.Client, served: Hub) -> None:
    served.seen.clear()
    assert http.post("/v1/jobs", json=body("org/good")).status_code == 202
    names = [path.rpartition("/")[2] for path in served.seen]
    assert sorted(names) == ["config.json", "main", "model.safetensors"]


@pytest.fixture
def tiers(stack: Stack) -> Iterator[None]:
    before = stack.context.settings
    stack.context.settings = before.model_copy(update={"route_by_memory": True})
    yield
    stack.context.settings = before


def queue_of(http: httpx2.Client, stack: Stack, spec: dict[str, object]) -> str:
    answer = http.post("/v1/jobs", json=spec)
    return stack.context.jobs.get(answer.json()["id"]).queue


@pytest.mark.usefixtures("tiers")
def test_job_waits_for_the_smallest_accelerator_that_holds_it(
    http: httpx2.Client, stack: Stack, served: Hub
) -> None:
    served.seen.clear()
    assert queue_of(http, stack, body("org/good")) == "gpu-24"
    assert len(served.seen) == 3
    learned = {"method": "omniquant", "omniquant": {"batch": 256}}
    huge = body("org/good") | {"calibration": {"length": 1 << 17}, "refinement": learned}
    assert both(http, huge) == (422, "too_large")


@pytest.mark.usefixtures("tiers")
def test_job_of_unknown_needs_waits_for_the_largest_accelerator_at_work(
    http: httpx2.Client, stack: Stack, served: Hub
) -> None:
    served.faults["config.json"] = 503
    assert queue_of(http, stack, body("org/good")) == "gpu-24"
    catalog = stack.context.catalog
    for name, queues in (("small", ("gpu-24",)), ("large", ("gpu-48", "gpu-24"))):
        catalog.beat(name, host="h", queues=queues, device="cuda", version="0")
    assert queue_of(http, stack, body("org/good")) == "gpu-48"
    catalog.leave("small")
    catalog.leave("large")


def test_local_job_is_planned_once_a_submission(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Path] = []

    def read_and_note(folder: Path, **options: Any) -> SourceModel:
        planned.append(folder)
        return read_source(folder, **options)

    monkeypatch.setattr(admission, "read_source", read_and_note)
    assert http.post("/v1/jobs", json=spec_json()).status_code == 202
    assert len(planned) == 1
    assert http.post("/v1/jobs?validate_only=true", json=spec_json()).status_code == 200
    assert len(planned) <= 2, "a plan may be kept"
