"""Learning inside the refinement of a whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitmill.calibration.windows import CalibrationSet
from bitmill.config.methods import OmniQuant
from bitmill.errors import CalibrationError
from bitmill.refinement.omniquant.model import MOMENTS_NAME, ModelLearning, TrellisLearning
from learning import block_data, starts, tiny

SPEC = OmniQuant(epochs=3, batch=4, tune_scales_steps=8)


def calibration() -> CalibrationSet:
    return CalibrationSet(tiny().tokens, tiny().held_out, "")


def streams() -> tuple[torch.Tensor, torch.Tensor]:
    data = block_data()
    return (
        torch.cat([data.inputs, data.held_out_inputs]),
        torch.cat([data.targets, data.held_out_targets]),
    )


def test_gradient_moments_are_measured_once(tmp_path: Path) -> None:
    """A later run takes the stored ones, whatever it would measure itself."""
    model = tiny().model
    for seed in (0, 1):
        learning = ModelLearning(model, model, calibration(), SPEC, tmp_path, seed=seed)
        learning.block(0, model.load_block(0), starts(0), *streams())
        stored = (tmp_path / MOMENTS_NAME).read_bytes()
        if seed == 0:
            first = stored
    assert stored == first


def test_tuning_without_held_out_sequences_is_refused_before_any_block(tmp_path: Path) -> None:
    model, spec = tiny().model, OmniQuant(tune_scales_steps=8)
    tokens = CalibrationSet(tiny().tokens, tiny().held_out[:0], "")
    with pytest.raises(CalibrationError, match="no held-out sequences"):
        TrellisLearning(model, model, tokens, spec, tmp_path, seed=0)


def test_tuning_happens_only_where_asked(tmp_path: Path) -> None:
    model = tiny().model
    weights = {n: w for i in range(model.block_count) for n, w in starts(i).items()}
    asked = ModelLearning(model, model, calibration(), SPEC, tmp_path, seed=0).tune(weights, {}, {})
    assert asked is not None
    assert asked.weights.keys() == weights.keys()
    assert asked.report.steps == 8
    silent = ModelLearning(model, model, calibration(), OmniQuant(), tmp_path, seed=0)
    assert silent.tune(weights, {}, {}) is None
