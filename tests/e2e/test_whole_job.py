"""The main job over HTTP on a tiny model: submitted, killed, resumed, downloaded, generating."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bitmill.io.manifest import check_folder
from bitmill_service.client.client import Client
from bitmill_service.client.errors import JobFailed
from bitmill_service.embedded.server import EmbeddedService
from stores import wait_for
from tiny import CALIBRATION, put_nan, tiny_llama
from warm_python import FORKED

pytestmark = pytest.mark.e2e
BLOCKS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a model, the same with a NaN in it, a text, and one that is too short."""
    root = tmp_path_factory.mktemp("models")
    folder = tiny_llama(
        root / "tiny",
        num_hidden_layers=BLOCKS,
        hidden_size=256,
        head_dim=64,
        intermediate_size=256,
    )
    put_nan(Path(shutil.copytree(folder, root / "nan")))
    (root / "text.txt").write_text(3 * CALIBRATION.read_text())
    (root / "short.txt").write_text("word " * 30)
    return root


@pytest.fixture(scope="module")
def client(service: EmbeddedService) -> Iterator[Client]:
    with Client(service.url) as opened:
        yield opened


def windows(
    sequences: int, length: int, held_out: int = 0, file: str = "text.txt"
) -> dict[str, Any]:
    """Calibration on a file of the root."""
    text = {"source": "file", "path": f"models/{file}"}
    return {"text": text, "sequences": sequences, "length": length, "held_out": held_out}


def spec(model: str = "tiny", **changes: Any) -> dict[str, Any]:
    return {
        "model": {"source": "path", "path": f"models/{model}"},
        "budget": {"code_bits": 3},
        "allocation": {"method": "sba", "order": "natural", "widths": [2, 3, 4]},
        "refinement": {"method": "gptq", "asymmetric": False},
        "calibration": windows(4, 64),
        "evaluation": {"texts": ["wiki_evaluation"], "sequences": 2, "length": 64},
    } | changes


def runners(service: EmbeddedService) -> list[psutil.Process]:
    """Runner processes, without the watchdog that each has as a child."""
    assert service.worker is not None
    pid = service.worker.pid
    below = psutil.Process(pid).children(recursive=True) if pid else []
    found = [p for p in below if "bitmill_workers.execution.runner" in p.cmdline()]
    return [p for p in found if p.ppid() not in {other.pid for other in found}]


@pytest.fixture(scope="module")
def undisturbed(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a job that nobody disturbed."""
    done = client.wait(client.submit(spec()).id, timeout=200)
    assert done.attempt == 1
    folder = tmp_path_factory.mktemp("undisturbed")
    client.download(done.id, folder)
    return folder


def test_checkpoint_is_whole_within_budget_and_generates(undisturbed: Path) -> None:
    manifest = check_folder(undisturbed)
    assert {"config.json", "model.safetensors", "bit_width_map.json"} <= manifest.files.keys()
    report = json.loads((undisturbed / "quality.json").read_text())
    row = report["rows"][-1]
    assert row["code_bits"] <= 3
    assert row["size"] == (undisturbed / "model.safetensors").stat().st_size
    arguments = ["generate", str(undisturbed), "A mill", "--max-new-tokens", "5", "--json"]
    said = subprocess.run(
        [sys.executable, "-P", "-m", "bitmill_service.cli.main", *arguments],
        env=os.environ | FORKED,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(said.stdout)["text"]


def test_what_one_job_learned_another_packs_without_training(
    client: Client, tmp_path: Path
) -> None:
    learning = {"epochs": 2, "batch": 2}
    asked = spec(
        refinement={"method": "omniquant", "omniquant": learning},
        calibration=windows(4, 64, held_out=2),
    )
    first = client.wait(client.submit(asked).id, timeout=200)
    given = {"source": "job", "job_id": first.id}
    asked["refinement"]["omniquant"] = learning | {"resume_parameters": given}
    asked["allocation"] = {"method": "map", "order": "natural", "map": given}
    second = client.wait(client.submit(asked).id, timeout=200)
    for job in (first, second):
        client.download(job.id, tmp_path / job.id)
    bytes_of = [(tmp_path / j.id / "model.safetensors").read_bytes() for j in (first, second)]
    assert bytes_of[0] == bytes_of[1]
    reports = [client.report(job.id) for job in (first, second)]
    assert [report["resumed"] for report in reports] == [False, True]
    assert reports[0]["blocks"] == reports[1]["blocks"]


def test_killed_runner_and_worker_resume_to_the_same_bytes(
    client: Client, service: EmbeddedService, undisturbed: Path, tmp_path: Path
) -> None:
    """A job shares no cache with others, so only its own finished blocks can help it."""
    job = client.submit(spec(label="killed")).id
    work = service.settings.job_folder(job) / "work"
    wait_for_block(client, job, 1, attempt=1)
    first = made_blocks(work)
    (runner,) = runners(service)
    runner.kill()
    wait_for_block(client, job, 2, attempt=2)
    assert service.worker is not None
    psutil.Process(service.worker.pid).kill()
    wait_for_block(client, job, 2, attempt=3)
    assert first.items() <= made_blocks(work).items(), "a finished block was done again"
    done = client.wait(job, timeout=200)
    assert done.attempt == 3
    client.download(job, tmp_path)
    for name in ("model.safetensors", "bit_width_map.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()


def wait_for_block(client: Client, job: str, block: int, *, attempt: int) -> None:
    """Until `block` blocks of stage refine are done in this attempt, and the job still runs."""

    def reached() -> bool:
        view = client.get(job)
        assert not view.terminal, f"the job ended before it could be killed: {view.error}"
        p = view.progress
        return view.attempt == attempt and p is not None and p.stage == "refine" and p.done >= block

    wait_for(reached, f"block {block}", 100)


def made_blocks(work: Path) -> dict[str, int]:
    """When each finished block of stage refine was written."""
    return {file.name: file.stat().st_mtime_ns for file in work.rglob("block-*.json")}


@pytest.mark.parametrize(
    ("bad", "code", "word"),
    [
        (spec("nan"), "non_finite_weights", "model.layers.1.mlp.up_proj"),
        (
            spec(calibration=windows(4, 128, file="short.txt")),
            "text_too_short",
            "1 sequences of 128 tokens",
        ),
    ],
    ids=["nan-weights", "short-text"],
)
def test_bad_input_fails_the_job_with_a_reason_and_leaves_nothing(
    client: Client, service: EmbeddedService, bad: dict[str, Any], code: str, word: str
) -> None:
    started = time.monotonic()
    job = client.submit(bad).id
    with pytest.raises(JobFailed) as failed:
        client.wait(job, timeout=100)
    assert time.monotonic() - started < 60
    assert (failed.value.code, word in failed.value.message) == (code, True), failed.value.message
    assert failed.value.job.attempt == 1
    data = service.settings.data
    wait_for(lambda: not (data / "jobs" / job).exists(), "the job's folder to go")
    assert not (data / "artifacts" / job).exists()
    assert runners(service) == []


def test_cancelled_job_stops_its_runner(client: Client, service: EmbeddedService) -> None:
    job = client.submit(spec(calibration=windows(64, 128))).id
    wait_for(lambda: client.get(job).stage is not None, "the runner")
    client.cancel(job)
    wait_for(lambda: client.get(job).state == "cancelled", "the cancel")
    assert runners(service) == []
    folder = service.settings.data / "artifacts" / job
    wait_for(lambda: not folder.exists(), "its files to be gone")


def test_nothing_of_the_service_needs_torch(service: EmbeddedService) -> None:
    """The worker's processes, unlike the runner's, have no torch library mapped."""
    assert service.worker is not None
    pid = service.worker.pid
    assert pid is not None
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libtorch" not in maps
    assert os.path.exists(service.settings.data / "logs" / "worker.log")
