"""A sweep on a tiny model: over HTTP with a worker that is killed, and here."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from bitmill.io.manifest import check_folder
from bitmill_service.client.client import Client
from bitmill_service.embedded.server import EmbeddedService
from bitmill_service.schemas import SweepView
from stores import wait_for
from tiny import CALIBRATION, put_nan, tiny_llama
from warm_python import FORKED

pytestmark = pytest.mark.e2e
COMMON = {
    "allocation": {"method": "knapsack", "order": "natural", "check": "off"},
    "refinement": {"asymmetric": False},
    "evaluation": {"texts": ["wiki_evaluation"], "sequences": 1, "length": 32},
    "threads": 1,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a model, one with a NaN in it, and a text."""
    root = tmp_path_factory.mktemp("models")
    shutil.copy(CALIBRATION, root / "text.txt")
    tiny_llama(root / "tiny")
    put_nan(tiny_llama(root / "nan"))
    return root


def grid(calibrations: int, methods: int, budgets: int) -> dict[str, Any]:
    text = {"source": "file", "path": "models/text.txt"}
    windows = [{"text": text, "sequences": n, "length": 32, "held_out": 0} for n in (2, 3, 4)]
    axes = {
        "calibration": windows[:calibrations],
        "refinement.method": ["rtn", "gptq"][:methods],
        "budget.code_bits": [2.5, 3, 4][:budgets],
    }
    return {"job": {"model": {"source": "path", "path": "models/tiny"}} | COMMON, "grid": axes}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2), pytest.param((3, 2, 3), marks=pytest.mark.slow)], ids=str
)
def test_a_sweep_survives_a_killed_worker_and_makes_each_distinct_stage_once(
    service: EmbeddedService, shape: tuple[int, int, int]
) -> None:
    calibrations, methods, budgets = shape
    with Client(service.url) as client:
        sweep = client.submit_sweep(grid(*shape))
        wait_for(lambda: _active(client.sweep(sweep.id), "profile"), "a profile to be made", 100)
        assert service.worker is not None
        psutil.Process(service.worker.pid).kill()
        done = client.wait_sweep(sweep.id)
        assert done.counts == {"succeeded": calibrations * methods * budgets}, client.sweep_table(
            sweep.id
        )
        made = Counter(
            event.data["stage"]
            for cell in done.cells or ()
            for event in client.events(str(cell.job_id))
            if event.kind == "stage" and event.data["state"] == "finished"
        )
    cells = calibrations * methods * budgets
    once = {"resolve": 1, "profile": calibrations, "allocate": calibrations * budgets}
    each = dict.fromkeys(("refine", "pack", "verify", "evaluate", "publish"), cells)
    each["evaluate"] += 1  # the source's own outputs, for all cells
    assert {stage: made[stage] for stage in (*once, *each)} == once | each
    folder = service.settings.sweep_folder(sweep.id)
    wait_for(lambda: not folder.exists(), "the shared stages to be removed")


def _active(view: SweepView, stage: str) -> bool:
    return any(c.state == "running" and c.stage == stage for c in view.cells or ())


def test_a_failed_cell_here_stops_nothing_and_only_it_is_run_again(
    root: Path, tmp_path: Path
) -> None:
    models = [{"source": "path", "path": str(root / name)} for name in ("nan", "tiny")]
    spec = grid(1, 1, 1)
    del spec["job"]["model"]
    spec["grid"] = {"model": models, "budget.code_bits": [3]}
    spec["job"]["allocation"] = {"method": "uniform", "order": "natural"}
    text = {"source": "file", "path": str(root / "text.txt")}
    spec["job"]["calibration"] = {"text": text, "sequences": 2, "length": 32, "held_out": 0}
    file, out = tmp_path / "study.yaml", tmp_path / "study"
    file.write_text(json.dumps(spec | {"grid": spec["grid"] | {"budget.code_bits": [3, 0.5]}}))
    command = [sys.executable, "-P", "-m", "bitmill_service.cli.main", "sweep", str(file)]

    def sweep(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--out", str(out), *options],
            env=os.environ | FORKED,
            capture_output=True,
            text=True,
            check=False,
        )

    refused = sweep()
    assert refused.returncode == 2
    assert "asked for by cell 2 (" in refused.stderr
    assert not out.exists()
    file.write_text(json.dumps(spec))
    ended = sweep("--json")
    assert ended.returncode == 3, ended.stderr
    rows = json.loads(ended.stdout)
    assert [row["state"] for row in rows] == ["failed", "succeeded"]
    assert "model.layers.1.mlp.up_proj" in rows[0]["error"]
    assert "cell 2 of 2 succeeded" in ended.stderr
    check_folder(out / "cell-02")
    with (out / "table.csv").open() as table:
        assert [row["state"] for row in csv.DictReader(table)] == [row["state"] for row in rows]
    assert "<svg" in (out / "plot.svg").read_text()
    before = (out / "cell-02" / "quality.json").stat().st_mtime_ns
    shutil.copyfile(root / "tiny" / "model.safetensors", root / "nan" / "model.safetensors")
    again = sweep()
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("succeeded") == 2
    assert (out / "cell-02" / "quality.json").stat().st_mtime_ns == before
    assert not (out / "stages").exists()
