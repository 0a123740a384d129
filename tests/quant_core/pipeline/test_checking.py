"""The process that checks the packed folder: what it judges, and that its death is no judgement."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bitmill.config.quantization import parse_config
from bitmill.errors import BitmillError, Cancelled, ResourceError, VerificationError
from bitmill.pipeline.job import run_job
from bitmill.pipeline.progress import Progress
from tiny import tiny_llama

pytestmark = pytest.mark.e2e

TEXT = {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def run(
    model: Path,
    folder: Path,
    when_checking: Callable[[], object] = lambda: None,
    should_stop: Callable[[list[Progress]], bool] = lambda _: False,
) -> list[Progress]:
    """Run a small job; `when_checking` is called when the stage `verify` starts."""
    config = parse_config(
        {
            "budget": {"code_bits": 4},
            "allocation": {"method": "uniform", "order": "natural"},
            "refinement": {"method": "rtn"},
            "calibration": {"text": TEXT, "sequences": 2, "length": 64, "held_out": 1},
            "evaluation": {"texts": ["wiki_evaluation"], "sequences": 1, "length": 64},
            "threads": 1,
        }
    )
    events: list[Progress] = []

    def on_progress(event: Progress) -> None:
        events.append(event)
        if (event.kind, event.stage, event.state) == ("stage", "verify", "started"):
            when_checking()

    run_job(
        config,
        model,
        folder / "work",
        folder / "out",
        on_progress=on_progress,
        should_stop=lambda: should_stop(events),
    )
    return events


def packed(events: list[Progress]) -> bool:
    return any((event.stage, event.state) == ("pack", "finished") for event in events)


@pytest.fixture(scope="module")
def unchecked(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a job that was stopped before its check."""
    folder = tmp_path_factory.mktemp("unchecked")
    with pytest.raises(Cancelled):
        run(llama, folder, should_stop=packed)
    return folder / "work"


@pytest.fixture
def folder(unchecked: Path, tmp_path: Path) -> Path:
    shutil.copytree(unchecked, tmp_path / "work")
    return tmp_path


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def kill_the_check() -> None:
    """Kill this process's child that verifies, as soon as there is one."""

    def act() -> None:
        limit = time.monotonic() + 120
        while time.monotonic() < limit:
            for child in children(os.getpid()):
                if b"verify" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                    os.kill(child, signal.SIGKILL)
                    return
            time.sleep(0.01)

    threading.Thread(target=act, daemon=True).start()


def test_killed_check_is_no_judgement_and_the_next_run_checks_again(
    llama: Path, folder: Path
) -> None:
    with pytest.raises(ResourceError, match="signal 9") as killed:
        run(llama, folder, kill_the_check)
    assert killed.value.code == "killed"
    assert "verification" not in killed.value.message
    assert not (folder / "out").exists()
    states = [(e.stage, e.state) for e in run(llama, folder) if e.kind == "stage"]
    assert ("pack", "skipped") in states
    assert ("verify", "finished") in states


def changed(folder: Path) -> None:
    weights = folder / "work/pack/packed/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def cut_short(folder: Path) -> None:
    os.truncate(folder / "work/pack/packed/model.safetensors", 100)


@pytest.mark.parametrize("damage", [changed, cut_short])
def test_damaged_folder_is_judged_and_not_published(
    llama: Path, folder: Path, damage: Callable[[Path], None]
) -> None:
    with pytest.raises(BitmillError) as judged:
        run(llama, folder, lambda: damage(folder))
    assert (type(judged.value), judged.value.code) == (VerificationError, "verification")
    assert not (folder / "out").exists()
