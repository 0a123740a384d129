"""Jobs that name learned parameters: what is refused when they are submitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from bitmill.pipeline.learned_parameters import RECORD_NAME, LearnedFor
from bitmill_service.cli.main import app
from bitmill_workers.job_spec import parse_spec
from finished import Stack, spec_json

LEARNING = {"epochs": 3}


def asked(source: dict[str, str], **omniquant: Any) -> dict[str, Any]:
    """A specification that names parameters, with settings of learning."""
    given = LEARNING | omniquant | {"resume_parameters": source}
    return spec_json(refinement={"method": "omniquant", "omniquant": given})


def record() -> str:
    learned = parse_spec(spec_json(refinement={"method": "omniquant", "omniquant": LEARNING}))
    return LearnedFor.of_job(learned.config(), model="m", calibration="c").model_dump_json()


@pytest.fixture(scope="module")
def learned(stack: Stack) -> str:
    """A succeeded job with learned parameters."""
    return stack.finish(stack.running(), others={RECORD_NAME: record()}).id


def test_job_with_the_same_settings_is_accepted(http: httpx2.Client, learned: str) -> None:
    answer = http.post("/v1/jobs", json=asked({"source": "job", "job_id": learned}))
    assert answer.status_code == 202
    stored = answer.json()["spec"]["refinement"]["omniquant"]
    assert stored["resume_parameters"] == {"source": "job", "job_id": learned}


def test_other_settings_are_refused_by_name(http: httpx2.Client, learned: str) -> None:
    source = {"source": "job", "job_id": learned}
    for query in ({}, {"validate_only": "true"}):
        answer = http.post("/v1/jobs", json=asked(source, epochs=4), params=query)
        assert (answer.status_code, answer.json()["code"]) == (422, "unfit_parameters")
        assert "refinement.omniquant.epochs 3, the job asks for 4" in answer.json()["detail"]


def test_jobs_without_learned_parameters_are_refused(http: httpx2.Client, stack: Stack) -> None:
    for job in ("nobody", stack.queued().id, stack.succeeded().id):
        answer = http.post("/v1/jobs", json=asked({"source": "job", "job_id": job}))
        assert (answer.status_code, answer.json()["code"]) == (422, "parameters_not_found")
        assert answer.json()["param"] == "refinement.omniquant.resume_parameters.job_id"


def test_folders_lie_below_a_root(http: httpx2.Client, models: Path) -> None:
    (models / "earlier").mkdir()
    (models / "earlier" / RECORD_NAME).write_text(record())
    expected = {
        "models/earlier": (202, None),
        "models/tiny": (422, "parameters_not_found"),
        "../earlier": (422, "path_not_allowed"),
        str(models / "earlier"): (422, "path_not_allowed"),
    }
    for path, answered in expected.items():
        answer = http.post("/v1/jobs", json=asked({"source": "path", "path": path}))
        assert (answer.status_code, answer.json().get("code")) == answered, path
    (models / "earlier" / RECORD_NAME).write_text("{")
    answer = http.post("/v1/jobs", json=asked({"source": "path", "path": "models/earlier"}))
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_format")


def test_command_line_names_a_job_or_a_folder(
    monkeypatch: pytest.MonkeyPatch, stack: Stack, learned: str, models: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("BITMILL_URL", stack.url)
    (models / "first").mkdir()
    (models / "first" / RECORD_NAME).write_text(record())
    file = tmp_path / "spec.json"
    given = spec_json(refinement={"method": "omniquant", "omniquant": LEARNING})
    file.write_text(json.dumps(given))
    for name, source in (
        (learned, {"source": "job", "job_id": learned}),
        ("path:models/first", {"source": "path", "path": "models/first"}),
    ):
        arguments = ["submit", "--spec", str(file), "--resume-parameters", name, "--json"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        omniquant = json.loads(result.output)["spec"]["refinement"]["omniquant"]
        assert omniquant["resume_parameters"] == source
        assert omniquant["epochs"] == 3
