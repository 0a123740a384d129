"""Each value of a specification is parsed once a process, and a job is planned once a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitmill_service.client.client import Client
from counting_plugin import counts, installed
from gguf_files import write_gguf
from stores import wait_for
from tiny import tiny_llama

pytestmark = pytest.mark.e2e

QUICK: dict[str, Any] = {
    "budget": {"code_bits": 3},
    "allocation": {"method": "uniform", "order": "natural"},
    "refinement": {"method": "rtn"},
    "calibration": {"sequences": 2, "length": 64, "held_out": 1},
    "evaluation": {"texts": ["wiki_evaluation"], "sequences": 1, "length": 64},
}


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_run_plans_once_and_its_checking_process_never(kind: str, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    if kind == "gguf":
        (tmp_path / "file").mkdir()
        source = write_gguf(tmp_path / "file" / "m.gguf", source).parent
    request = {
        "model": str(source),
        "file": "m.gguf" if kind == "gguf" else None,
        "config": QUICK,
        "out": str(tmp_path / "out"),
        "work": str(tmp_path / "work"),
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bitmill", "quantize", str(tmp_path / "request.json")],
        env=os.environ | installed(tmp_path / "site"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = counts(tmp_path / "site")
    run, check = found["quantize"], found["verify"]
    assert (run["Plan made"], run["QuantizeRequest parsed"]) == (1, 1)
    assert run["QuantizationConfig parsed"] == 0  # a part of the request
    assert (check["Plan made"], check["Plan parsed"]) == (0, 1)


def test_a_submission_is_planned_once_and_its_supervisor_parses_once(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "models" / "tiny")
    command = [sys.executable, "-P", "-m", "bitmill_service.cli.main", "serve", "--port", "0"]
    command += ["--json", "--data", str(tmp_path / "data")]
    command += ["--models", f"models={tmp_path / 'models'}"]
    environment = installed(tmp_path / "site") | {"BITMILL_RUNNER_MODULE": "acting_runner"}
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line, "the service did not start"
            text += line
        with Client(json.loads(text)["url"]) as client:
            job = client.submit({"model": {"source": "path", "path": "models/tiny"}} | QUICK)
            wait_for(lambda: client.get(job.id).terminal, "the job's end")
            assert client.get(job.id).state == "succeeded"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()
    found = counts(tmp_path / "site")
    assert found["serve"] == {"QuantizationConfig made": 1, "Plan made": 1}
    worker = found["bitmill_service.embedded.worker_process"]
    assert worker == {"JobSpec parsed": 1, "QuantizationConfig made": 1}
