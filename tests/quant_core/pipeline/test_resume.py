"""Learned parameters of one job, taken over by another without training."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import QuantizationConfig, parse_config
from bitmill.errors import FormatError, InputError, SpecError
from bitmill.io.manifest import check_folder, write_manifest
from bitmill.pipeline.job import Result, run_job
from bitmill.pipeline.learned_parameters import RECORD_NAME, LearnedFor
from tiny import tiny_llama
from warm_python import FORKED

pytestmark = pytest.mark.e2e

TEXT = {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")}
LEARNING = {"epochs": 2, "batch": 2, "tune_scales_steps": 4}


def spec(omniquant: dict[str, Any], **changes: Any) -> QuantizationConfig:
    base: dict[str, Any] = {
        "budget": {"code_bits": 3},
        "allocation": {"method": "knapsack", "order": "activation", "embeddings": "quantize"},
        "refinement": {"method": "omniquant", "omniquant": omniquant},
        "calibration": {"text": TEXT, "sequences": 4, "length": 64, "held_out": 2},
        "evaluation": {"texts": ["wiki_evaluation"], "sequences": 2, "length": 64},
        "threads": 1,
    }
    return parse_config(base | changes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


class Trained:
    """A job that learned: its specification, folder and result."""

    def __init__(self, model: Path, folder: Path, omniquant: dict[str, Any]) -> None:
        self.omniquant, self.out = omniquant, folder / "out"
        self.result = run_job(spec(omniquant), model, folder / "work", self.out)

    def resumed(self, folder: Path | None = None, **changes: Any) -> QuantizationConfig:
        """The specification of a job that takes this one's parameters, with its map."""
        given = str(folder or self.out)
        bit_widths = json.loads((self.out / "bit_width_map.json").read_text())
        allocation = {
            "method": "map",
            "order": "activation",
            "embeddings": "quantize",
            "map": bit_widths,
        }
        asked = {"allocation": allocation} | changes
        return spec(self.omniquant | {"resume_parameters": given}, **asked)


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(llama, tmp_path_factory.mktemp("trained"), LEARNING)


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def run(
    asked: QuantizationConfig, model: Path, folder: Path, events: list[Any] | None = None
) -> Result:
    told = [] if events is None else events
    return run_job(asked, model, folder / "work", folder / "out", on_progress=told.append)


def test_a_resumed_job_gives_the_same_bytes_and_trains_nothing(
    llama: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("refine.refine_model", "profile.make_profile"):
        monkeypatch.delattr(f"bitmill.pipeline.stages.{name}")
    result = run(trained.resumed(), llama, tmp_path)
    assert stored(tmp_path / "out") == stored(trained.out)
    assert check_folder(tmp_path / "out") == result.manifest
    before, after = trained.result.quality, result.quality
    assert (before.resumed, after.resumed) == (False, True)
    assert (after.blocks, after.tuning, after.linears) == (
        before.blocks,
        before.tuning,
        before.linears,
    )
    assert after.row("map omniquant").texts == before.row("knapsack omniquant").texts
    record = (tmp_path / "out" / RECORD_NAME).read_bytes()
    assert record == (trained.out / RECORD_NAME).read_bytes()


def test_the_command_takes_the_folder_and_says_what_was_learned(
    llama: Path, trained: Trained, tmp_path: Path
) -> None:
    (tmp_path / "spec.json").write_text(spec(LEARNING).model_dump_json())
    options = {"--spec": tmp_path / "spec.json", "--out": tmp_path / "out"}
    options |= {"--method": "map", "--map": trained.out / "bit_width_map.json"}
    options |= {"--resume-parameters": trained.out}
    arguments = [str(word) for pair in options.items() for word in pair]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bitmill_service.cli.main", "quantize", llama, *arguments],
        env=os.environ | FORKED,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert stored(tmp_path / "out") == stored(trained.out)
    assert "learned by an earlier job; nothing was trained\n" in done.stdout
    assert re.search(r"^learned \d of 2 blocks in", done.stdout, re.MULTILINE)
    assert re.search(r"^tuned all scales in", done.stdout, re.MULTILINE)


def test_clipping_strengths_are_resumed_through_the_same_map_made_again(
    llama: Path, tmp_path: Path
) -> None:
    """The allocator finds the same map, and other measurements may be asked for."""
    clipped = Trained(llama, tmp_path, {"mode": "clipping", "epochs": 2})
    other = {
        "allocation": spec({}).allocation.model_dump(mode="json"),
        "evaluation": {"texts": ["handbook_evaluation"], "sequences": 1, "length": 32},
    }
    result = run(clipped.resumed(**other), llama, tmp_path / "second")
    assert stored(tmp_path / "second" / "out") == stored(clipped.out)
    assert list(result.quality.rows[1].texts) == ["handbook_evaluation"]


def test_another_map_is_refused_by_the_first_linear_that_differs(
    llama: Path, trained: Trained, tmp_path: Path
) -> None:
    asked = trained.resumed().model_dump(mode="json")
    linears = asked["allocation"]["map"]["linears"]
    name = next(n for n, widths in linears.items() if widths[0] in "3456")
    linears[name] = "2" + linears[name][1:]
    with pytest.raises(InputError, match=f"another bit-width map, which differs at {name}") as no:
        run(parse_config(asked), llama, tmp_path)
    assert no.value.code == "unfit_parameters"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seed": 1}, "seed 0, the job asks for 1"),
        ({"calibration": {"text": TEXT, "sequences": 3, "length": 64, "held_out": 2}}, "windows"),
    ],
)
def test_other_settings_are_refused(
    llama: Path, trained: Trained, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        run(trained.resumed(**changes), llama, tmp_path)


def test_other_settings_of_learning_are_refused_by_name(
    llama: Path, trained: Trained, tmp_path: Path
) -> None:
    asked = trained.resumed().model_dump(mode="json")
    asked["refinement"]["omniquant"]["epochs"] = 3
    with pytest.raises(InputError, match=r"refinement\.omniquant\.epochs 2, the job asks for 3"):
        run(parse_config(asked), llama, tmp_path)


def test_another_model_is_refused(trained: Trained, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "model", seed=1)
    with pytest.raises(InputError, match="another model"):
        run(trained.resumed(), other, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "quality.json"])
def test_damaged_files_are_refused_by_name(
    llama: Path, trained: Trained, tmp_path: Path, name: str
) -> None:
    copy = shutil.copytree(trained.out, tmp_path / "copy")
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(FormatError, match=f"{name} of copy is missing or has another SHA") as no:
        run(trained.resumed(copy), llama, tmp_path)
    assert no.value.code == "damaged_parameters"
    (copy / name).unlink()
    with pytest.raises(FormatError, match=f"{name} of copy is missing"):
        run(trained.resumed(copy), llama, tmp_path)


def test_a_folder_without_a_whole_report_is_refused(
    llama: Path, trained: Trained, tmp_path: Path
) -> None:
    copy = shutil.copytree(trained.out, tmp_path / "copy")
    report = json.loads((copy / "quality.json").read_text())
    report["blocks"].pop()
    (copy / "quality.json").write_text(json.dumps(report))
    write_manifest(copy)
    with pytest.raises(FormatError, match="does not report on every block"):
        run(trained.resumed(copy), llama, tmp_path)


def test_a_folder_that_learned_nothing_is_refused(
    llama: Path, trained: Trained, tmp_path: Path
) -> None:
    plain = {"method": "uniform", "order": "natural"}
    asked = spec({}, refinement={"method": "rtn"}, allocation=plain)
    run(asked, llama, tmp_path / "rtn")
    assert not (tmp_path / "rtn" / "out" / RECORD_NAME).exists()
    with pytest.raises(FormatError, match=f"out holds no {RECORD_NAME}") as no:
        run(trained.resumed(tmp_path / "rtn" / "out"), llama, tmp_path)
    assert no.value.code == "no_learned_parameters"


def test_parameters_are_for_learning() -> None:
    with pytest.raises(SpecError, match="give method 'omniquant'"):
        spec({}, refinement={"method": "gptq", "omniquant": {"resume_parameters": "earlier"}})


def test_records_of_other_versions_are_refused() -> None:
    asked = LearnedFor.of_job(spec(LEARNING), model="m", calibration="c")
    assert LearnedFor.parse(asked.model_dump_json().encode()) == asked
    later = asked.model_dump(mode="json") | {"schema_version": 2}
    with pytest.raises(FormatError, match=r"learned_parameters\.json cannot be read"):
        LearnedFor.parse(json.dumps(later).encode())


def test_a_map_in_another_order_is_another_map(trained: Trained) -> None:
    from bitmill.pipeline.learned_parameters import LearnedParameters

    learned = LearnedParameters.open(trained.out)
    bit_widths = BitWidthMap.load(trained.out / "bit_width_map.json")
    learned.check_map(bit_widths)
    with pytest.raises(InputError, match="column order 'activation'"):
        learned.check_map(bit_widths.model_copy(update={"order": "natural"}))
