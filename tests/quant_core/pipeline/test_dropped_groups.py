"""Jobs whose groups may have width 0, from the profile to the packed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bitmill
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
    "widths": (0, 1, 2, 3, 4),
    "bits": 1.4,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source") / "model")


def test_maps_with_and_without_dropped_groups_are_refined_and_the_better_is_taken(
    source: Path, tmp_path: Path
) -> None:
    made = bitmill.quantize(source, out=tmp_path / "out", **QUICK)
    refined = [check for check in made.quality.checks if check.method.endswith(", refined")]
    assert len(refined) == 2
    (taken,) = [check for check in made.quality.checks if check.taken]
    assert taken.kl == min(check.kl for check in refined)
    dropped = any(0 in widths for widths in made.map.linears.values())
    assert taken == refined[dropped]  # the one without comes first


def test_a_packed_model_computes_with_dropped_groups_as_zeros(source: Path, tmp_path: Path) -> None:
    made = bitmill.quantize(source, out=tmp_path / "out", check="off", **QUICK)
    assert any(0 in widths for widths in made.map.linears.values())
    assert made.bits is not None
    assert made.bits <= 1.4
    model, tokens = bitmill.load(made, dtype=torch.float32), torch.arange(3, 40)[None]
    with torch.no_grad():
        packed = model(tokens).logits
        plain = model.dequantize()(tokens).logits
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-4)
