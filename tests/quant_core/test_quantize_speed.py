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
    units = [speed.Unit("refine", i + 1, {"other": seconds}) for i, seconds in enumerate((9, 1, 1))]
    options = Namespace(blocks=2)
    found = {"block": 1.0, "all_blocks": 13.0}
    speed.pass_of_weights(found, units, options, speed.SHAPES["tiny"])
    assert found["weights_pass"] == 8
    assert found["all_blocks"] == 21
