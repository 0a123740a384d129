"""Learning inside the refinement of a whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitmill.blocks import weight_of
from bitmill.calibration import CalibrationSet
from bitmill.learning import MOMENTS_NAME, ModelLearning, learned_path
from bitmill.spec import OmniQuant
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


def test_a_second_run_and_a_resumed_one_give_the_same_bytes(tmp_path: Path) -> None:
    model = tiny().model
    folders = tmp_path / "first", tmp_path / "second"
    results = []
    for folder, resume in zip(folders, (None, folders[0]), strict=True):
        folder.mkdir()
        learning = ModelLearning(
            model, calibration(), SPEC, folder, seed=0, resume_parameters=resume
        )
        block = model.load_block(0)
        results.append((block, learning.block(0, block, starts(0, (1, 3)), *streams())))
    (_, first), (block, second) = results
    assert first.report.kept == "learned"
    assert second.report.kept == "resumed"
    assert second.report.steps == 0
    assert second.report.loss_after == pytest.approx(first.report.loss_after)
    for name, module in model.linears(block, 0).items():
        assert torch.equal(second.weights[name].codes, first.weights[name].codes)
        assert torch.equal(second.weights[name].scales, first.weights[name].scales)
        assert torch.equal(weight_of(module), first.weights[name].dequantize())
    stored = [learned_path(folder, 0).read_bytes() for folder in folders]
    assert stored[0] == stored[1]


def test_gradient_moments_are_measured_once(tmp_path: Path) -> None:
    """A later run takes the stored ones, whatever it would measure itself."""
    model = tiny().model
    for seed in (0, 1):
        learning = ModelLearning(model, calibration(), SPEC, tmp_path, seed=seed)
        learning.block(0, model.load_block(0), starts(0), *streams())
        stored = (tmp_path / MOMENTS_NAME).read_bytes()
        if seed == 0:
            first = stored
    assert stored == first


def test_tuning_happens_only_where_asked(tmp_path: Path) -> None:
    model = tiny().model
    weights = {n: w for i in range(model.block_count) for n, w in starts(i).items()}
    asked = ModelLearning(model, calibration(), SPEC, tmp_path, seed=0).tune(weights)
    assert asked is not None
    assert asked[0].keys() == weights.keys()
    assert asked[1].steps == 8
    silent = ModelLearning(model, calibration(), OmniQuant(), tmp_path, seed=0)
    assert silent.tune(weights) is None
