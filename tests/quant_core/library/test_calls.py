"""The library's functions on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import bitmill
from bitmill.errors import BudgetError, InputError, SpecError
from bitmill.io.manifest import check_folder
from tiny import tinier_llama
from warm_python import FORKED

pytestmark = pytest.mark.e2e

TEXT = str(Path(__file__).parents[1] / "calibration.txt")
QUICK: dict[str, Any] = {
    "text": TEXT,
    "calibration_sequences": 4,
    "calibration_length": 64,
    "held_out": 1,
    "texts": ("wiki_evaluation",),
    "evaluation_sequences": 1,
    "evaluation_length": 64,
    "threads": 1,
}


def published(folder: Path) -> dict[str, bytes]:
    """All files but the lists of files; of the report what no clock decides."""
    found = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    report = json.loads(found["quality.json"])
    del report["seconds"], found["MANIFEST.json"], found["SHA256SUMS"]
    return found | {"quality.json": json.dumps(report).encode()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinier_llama(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bitmill.Result:
    out = tmp_path_factory.mktemp("packed") / "new" / "out"
    return bitmill.quantize(source, bits=3.5, out=out, **QUICK)


def test_the_result_says_what_was_made(packed: bitmill.Result, tmp_path: Path) -> None:
    assert check_folder(packed.folder) == packed.manifest
    assert [path.name for path in packed.folder.parent.iterdir()] == ["out"]
    assert packed.bits is not None
    assert 3.4 < packed.bits <= 3.5
    assert packed.size == (packed.folder / "model.safetensors").stat().st_size
    assert packed.predicted_loss == packed.quality.predicted_loss
    text = packed.row.texts["wiki_evaluation"]
    for part in ("14 linears", f"{packed.size:,} bytes", f"{packed.bits:.4f} bits"):
        assert part in repr(packed)
    assert f"perplexity {text.perplexity:.2f}" in repr(packed)
    again = bitmill.Result.read(packed.folder, packed.profile_id)
    assert again == packed
    assert bitmill.load(packed).num_parameters() == packed.load().num_parameters()
    packed.write_report(tmp_path / "report.html")
    assert "<html" in (tmp_path / "report.html").read_text()


def test_the_command_line_makes_the_same_bytes(
    source: Path, packed: bitmill.Result, tmp_path: Path
) -> None:
    options = ["--bits", "3.5", "--calibration-text", TEXT, "--threads", "1", "--held-out", "1"]
    options += ["--calibration-sequences", "4", "--calibration-length", "64"]
    options += ["--evaluation-sequences", "1", "--evaluation-length", "64"]
    options += ["--evaluation-texts", "wiki_evaluation", "--out", str(tmp_path / "new" / "out")]
    command = [sys.executable, "-P", "-m", "bitmill_service.cli.main", "quantize", str(source)]
    done = subprocess.run(
        [*command, *options],
        env=os.environ | FORKED,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert published(tmp_path / "new" / "out") == published(packed.folder)


def test_calls_in_threads_and_again_make_the_same_bytes(
    source: Path, packed: bitmill.Result, tmp_path: Path
) -> None:
    def call(name: str) -> bitmill.Result:
        return bitmill.quantize(source, bits=3.5, out=tmp_path / name, **QUICK)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(call, ["first", "second"]))
    found.append(call("first"))  # replaces its own result
    for result in found:
        assert published(result.folder) == published(packed.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def interrupt(_: object) -> None:
    signal.raise_signal(signal.SIGINT)


def fail(_: object) -> None:
    raise LookupError("of the caller")


@pytest.mark.parametrize(
    ("act", "kind"), [(interrupt, KeyboardInterrupt), (fail, LookupError)], ids=["Ctrl-C", "error"]
)
@pytest.mark.parametrize("stage", ["resolve", "refine", "publish"])
def test_a_call_that_is_broken_off_leaves_nothing(
    source: Path,
    tmp_path: Path,
    act: Callable[[object], None],
    kind: type[BaseException],
    stage: str,
) -> None:
    def watch(event: bitmill.Progress) -> None:
        if event.stage == stage:
            act(event)

    with pytest.raises(kind):
        bitmill.quantize(
            source,
            code_bits=3,
            out=tmp_path / "a" / "b",
            **QUICK,
            allocation={"method": "uniform", "order": "natural"},
            refinement="rtn",
            progress=watch,
        )
    assert not list(tmp_path.iterdir())


def test_a_call_goes_on_where_it_was_broken_off(source: Path, tmp_path: Path) -> None:
    asked = QUICK | {"code_bits": 3, "allocation": "uniform", "refinement": "rtn"}
    told: list[bitmill.Progress] = []

    def watch(event: bitmill.Progress) -> None:
        told.append(event)
        if event.stage == "pack":
            raise bitmill.Cancelled("enough")

    with pytest.raises(bitmill.Cancelled, match="enough"):
        bitmill.quantize(source, out=tmp_path / "out", work=tmp_path / "w", progress=watch, **asked)
    first, told = told, []
    bitmill.quantize(
        source, out=tmp_path / "out", work=tmp_path / "w", progress=told.append, **asked
    )
    assert "refine" in {event.stage for event in first if event.state == "finished"}
    assert "refine" in {event.stage for event in told if event.state == "skipped"}


def test_what_is_refused_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="bitz"):
        bitmill.quantize(source, bitz=3, out=tmp_path / "a" / "out")
    with pytest.raises(BudgetError):
        bitmill.quantize(source, bits=0.5, out=tmp_path / "a" / "out", **QUICK)
    assert not list(tmp_path.iterdir())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(InputError) as caught:
        bitmill.quantize(source, bits=3, out=tmp_path / "notes", **QUICK)
    assert caught.value.code == "output_exists"


def test_one_profile_serves_allocation_refinement_and_sweeps(
    source: Path, packed: bitmill.Result, tmp_path: Path
) -> None:
    profiled = bitmill.profile(source, **QUICK)
    assert profiled.profile.key == packed.profile_id
    profiled.save(tmp_path / "stored")
    for given in (profiled, tmp_path / "stored"):
        found = bitmill.allocate(given, bits=3.5)
        assert (found.map, found.size, found.bits) == (packed.map, packed.size, packed.bits)
        assert found.predicted_loss == profiled.profile.predicted_loss(packed.map.linears)
    assert f"{found.size:,} bytes" in repr(found)
    with pytest.raises(SpecError, match=r"allocation\.order"):
        bitmill.allocate(profiled, bits=3, order="natural")
    with pytest.raises(SpecError, match="budget"):
        bitmill.allocate(profiled)
    with pytest.raises(SpecError, match="held_out"):
        bitmill.allocate(profiled, bits=3, held_out=2)

    refined = bitmill.refine(source, found, out=tmp_path / "refined", **QUICK)
    assert refined.map == packed.map
    assert not refined.quality.warnings
    files = [f.folder / "model.safetensors" for f in (refined, packed)]
    assert files[0].read_bytes() == files[1].read_bytes()

    measured: list[str] = []

    def watch(event: bitmill.Progress) -> None:
        if event.stage == "profile" and event.kind == "progress":
            measured.append(event.stage)

    budgets = [3.5, bitmill.Budget(code_bits=3)]
    results = bitmill.sweep(source, budgets, out=tmp_path / "sweep", progress=watch, **QUICK)
    assert [result.folder.name for result in results] == ["bits-3.5", "code_bits-3"]
    assert published(results[0].folder) == published(packed.folder)
    blocks = len(measured)
    bitmill.profile(source, progress=watch, **QUICK)
    assert len(measured) == 2 * blocks  # both budgets took what was measured once
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"stored", "refined", "sweep"}


def test_a_sweep_checks_all_budgets_first(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        bitmill.sweep(source, [3, 0.5], out=tmp_path / "sweep", **QUICK)
    with pytest.raises(SpecError, match="once"):
        bitmill.sweep(source, [3, 3.0], out=tmp_path / "sweep", **QUICK)
    assert not list(tmp_path.iterdir())


def test_a_map_says_what_is_kept(source: Path, tmp_path: Path) -> None:
    """Of linears that a map does not name the packed folder holds the source's weights."""
    name = "model.layers.0.mlp.down_proj"
    given = bitmill.BitWidthMap(linears={name: (3, 4)})
    asked = QUICK | {"refinement": "rtn"}
    result = bitmill.refine(source, given, out=tmp_path / "out", **asked)
    assert result.map == given
    rows = bitmill.evaluate(result, source, texts=("wiki_evaluation",), sequences=1, length=64)
    assert [row.method for row in rows] == ["source", "packed"]
    assert rows[1].texts == result.row.texts


@pytest.mark.parametrize("kept", ["model.layers.0.*", "model.layers.1.*"])
@pytest.mark.parametrize(
    ("allocation", "refinement"),
    [
        ("knapsack", "gptq"),
        ("uniform", bitmill.OmniQuant(epochs=1, batch=2)),
        ({"method": "sba", "widths": (2, 3, 4)}, "rtn"),
    ],
    ids=["knapsack", "learned", "sba"],
)
def test_a_whole_block_may_be_kept(
    source: Path, tmp_path: Path, kept: str, allocation: Any, refinement: Any
) -> None:
    result = bitmill.quantize(
        source,
        code_bits=3,
        out=tmp_path / "out",
        allocation=allocation,
        refinement=refinement,
        keep=(kept,),
        **QUICK,
    )
    assert len(result.map.linears) == 7
    assert not [name for name in result.map.linears if name.startswith(kept[:-1])]


def test_a_result_is_written_in_other_formats(packed: bitmill.Result, tmp_path: Path) -> None:
    report = bitmill.export(packed, "dequantized", out=tmp_path / "plain")
    assert report.packed_bytes == packed.size
    assert check_folder(tmp_path / "plain").total_bytes > report.file_bytes
    for format, settings, said in (
        ("no_format", {}, "no_format"),
        ("dequantized", {"bitz": 3}, "bitz"),
    ):
        with pytest.raises(SpecError, match=said):
            bitmill.export(packed, format, out=tmp_path / "other", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_a_profile_that_nobody_needs_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="needs no profile"):
        bitmill.profile(source, allocation="uniform", order="natural", **QUICK)


@pytest.mark.parametrize("code", ["affine", "trellis"])
def test_several_devices_work_in_processes_of_their_own(
    source: Path, tmp_path: Path, code: str
) -> None:
    told: list[bitmill.Progress] = []
    result = bitmill.quantize(
        source,
        code=code,
        code_bits=3,
        out=tmp_path / "out",
        allocation={"method": "uniform", "order": "natural"},
        refinement="rtn",
        devices=2,
        progress=told.append,
        **(QUICK | {"threads": 2}),
    )
    assert result.code_bits == 3
    assert {event.stage for event in told} >= {"resolve", "refine", "publish"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
