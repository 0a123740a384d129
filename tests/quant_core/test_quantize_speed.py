"""The speed benchmark runs the job's stages and extrapolates their blocks."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

PLACE = Path(__file__).parents[2] / "benchmarks" / "quantize_speed.py"


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quantize_speed", PLACE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quantize_speed"] = module
    spec.loader.exec_module(module)
    return module


def test_a_tiny_job_is_timed_stage_by_stage(speed: ModuleType, tmp_path: Path) -> None:
    arguments = "--shape tiny --blocks 2 --sequences 3 --held-out 1 --tokens 24 --device cpu"
    arguments += " --allocation uniform --without compensated_grid"
    assert speed.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "quantize-speed-tiny-uniform.json").read_text())
    assert result["of_blocks"] == 4
    for stage in ("profile", "refine", "pack"):
        part = result["stages"][stage]
        assert 0 < part["block"] <= part["measured"]
        assert part["all_blocks"] == pytest.approx(part["measured"] + 2 * part["block"], abs=0.01)
    assert {"read", "forward", "write"} <= set(result["stages"]["refine"]["block_parts"])
    assert result["refinement"]["compensated_grid"] is False
    whole, run = result["estimated_for_all_blocks"], result["estimated_for_these_blocks"]
    assert whole["largest_size"] > run["largest_size"]
    assert "| refine |" in (tmp_path / "quantize-speed-tiny-uniform.md").read_text()


@pytest.mark.parametrize(("stage", "block"), [("profile", 2), ("refine", 1)])
def test_missing_blocks_cost_the_median_of_whole_ones(
    speed: ModuleType, stage: str, block: float
) -> None:
    """Of refinement the last unit is short, its block was begun in the one before."""

    def unit(number: int, seconds: float) -> object:
        return speed.Unit(stage, number, {"forward": seconds})

    units = [unit(0, 99.0), *(unit(i + 1, seconds) for i, seconds in enumerate((9, 1, 3)))]
    found = speed.seconds_of(stage, units, Namespace(blocks=3), speed.SHAPES["tiny"])
    assert found["measured"] == 13
    assert found["block"] == block
    assert found["all_blocks"] == 13 + block


def test_the_pass_before_the_first_block_grows_with_the_blocks(speed: ModuleType) -> None:
    """All but its head, and nothing else that refinement begins with."""
    parts = {"refine start": {"other": 5.0}, speed.WEIGHTS: {"forward": 6.0, "head": 2.0}}
    units = [speed.Unit(name, 0, seconds) for name, seconds in parts.items()]
    units += [speed.Unit("refine", i + 1, {"other": 1.0}) for i in range(2)]
    found = {"block": 1.0, "measured": 2.0, "all_blocks": 4.0}
    speed.pass_of_weights(found, units, Namespace(blocks=2), speed.SHAPES["tiny"])
    assert found == {"block": 1.0, "measured": 15.0, "all_blocks": 23.0, "weights_pass": 8.0}


def test_passes_for_the_weights_of_tokens_are_units_of_their_own(
    speed: ModuleType, tmp_path: Path
) -> None:
    arguments = "--shape tiny --blocks 1 --sequences 2 --held-out 1 --tokens 24 --device cpu"
    arguments += " --allocation uniform --code trellis --bits 1"
    assert speed.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "quantize-speed-tiny-uniform.json").read_text())
    passes = [unit["seconds"] for unit in result["units"] if unit["stage"] == speed.WEIGHTS]
    assert len(passes) == 2
    assert all(seconds["backward"] > 0 for seconds in passes)
    assert "backward" not in result["stages"]["refine"]["block_parts"]
    whole = sum(sum(seconds.values()) for seconds in passes)
    assert result["stages"]["refine"]["weights_pass"] == pytest.approx(whole, abs=0.01)
