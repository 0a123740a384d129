"""Jobs whose linears may keep columns in 16 bits, from the profile to the packed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bitmill
from bitmill.config.quantization import parse_config
from bitmill.errors import SpecError
from bitmill.inference.load import load_plain
from bitmill.pipeline.admission import admit
from tiny import tiny_llama

pytestmark = pytest.mark.e2e

QUICK: dict[str, Any] = {
    "text": str(Path(__file__).parents[1] / "calibration.txt"),
    "calibration_sequences": 4,
    "calibration_length": 64,
    "held_out": 2,
    "texts": ("wiki_evaluation",),
    "evaluation_sequences": 1,
    "evaluation_length": 64,
    "threads": 1,
}
COUNTS = (1, 4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def made(source: Path, profiles: Path, tmp_path_factory: pytest.TempPathFactory) -> bitmill.Result:
    out = tmp_path_factory.mktemp("made") / "out"
    asked = {"bits": 3.5, "outliers": COUNTS, "check": "off", "profiles": profiles}
    return bitmill.quantize(source, out=out, **asked, **QUICK)


def test_a_packed_model_computes_with_outliers_beside_its_codes(made: bitmill.Result) -> None:
    assert made.map.outliers
    assert set(made.map.outliers.values()) <= set(COUNTS)
    assert made.bits is not None
    assert made.bits <= 3.5
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    model, tokens = bitmill.load(made, dtype=torch.float32), torch.arange(3, 40)[None]
    with torch.no_grad():
        packed = model(tokens).logits
        plain = model.dequantize()(tokens).logits
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-4)


def test_its_map_gives_the_same_model_again(
    made: bitmill.Result, source: Path, tmp_path: Path
) -> None:
    again = bitmill.refine(source, made.folder, out=tmp_path / "again", **QUICK)
    assert again.map == made.map
    files = [folder.joinpath("model.safetensors") for folder in (made.folder, again.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_exports_without_a_place_for_them_refuse_and_weights_take_them(
    made: bitmill.Result, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=r"allocation\.outliers: it has no place for columns"):
        bitmill.export(made, "mlx", out=tmp_path / "mlx")
    bitmill.export(made, "dequantized", out=tmp_path / "plain")
    plain = bitmill.load(made, dtype=torch.float32).dequantize().state_dict()
    name = f"{next(iter(made.map.outliers))}.weight"
    found = load_plain(tmp_path / "plain", dtype="float32").state_dict()
    torch.testing.assert_close(found[name], plain[name], atol=1e-2, rtol=1e-2)


def test_the_map_without_outliers_is_measured_beside_the_one_with(
    source: Path, profiles: Path, tmp_path: Path
) -> None:
    asked = {"bits": 3.5, "outliers": COUNTS, "profiles": profiles}
    result = bitmill.quantize(source, out=tmp_path / "out", **asked, **QUICK)
    checks = {check.method: check for check in result.quality.checks}
    assert checks.keys() == {"knapsack", "uniform", "knapsack without outliers"}
    assert checks["knapsack"].predicted_loss < checks["knapsack without outliers"].predicted_loss
    (taken,) = [check for check in checks.values() if check.taken]
    assert taken.kl == min(check.kl for check in checks.values())
    assert bool(result.map.outliers) == (taken.method == "knapsack")


def test_a_job_for_a_format_without_a_place_for_them_is_refused_before_it_runs(
    source: Path,
) -> None:
    spec = {"budget": {"bits": 3}, "allocation": {"outliers": [1]}, "format": "bitmill-2"}
    with pytest.raises(SpecError, match="outlier columns with refinement"):
        admit(source, parse_config(spec))


def test_more_outliers_than_any_linear_has_columns_are_refused(source: Path) -> None:
    spec = {"budget": {"bits": 3}, "allocation": {"outliers": [4, 256, 300]}}
    with pytest.raises(SpecError, match=r"outliers \[256, 300\]: the widest linear has 256 col"):
        admit(source, parse_config(spec))
    admit(source, parse_config(spec | {"allocation": {"outliers": [4, 255]}}))
