"""When the report says that learning overfits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitmill.refinement.omniquant.block import BlockData, learn_block
from bitmill.refinement.omniquant.settings import LearningSettings
from bitmill.reporting.learning import (
    held_out_change,
    mean_change,
    overfitting_warnings,
    text_changes,
)
from bitmill.results import BlockQuality, TuningQuality
from learning import starts, tiny


def block(after: float, other: float, index: int = 0) -> BlockQuality:
    """Errors of 1 before learning."""
    return BlockQuality(
        index=index,
        mode="rounding",
        kept="learned",
        loss_before=1.0,
        loss_after=after,
        texts={"handbook_evaluation": (1.0, other)},
        seconds=1.0,
    )


def tuning(after: float, other: float, *, kept: bool = True) -> TuningQuality:
    """KL of 1 before tuning."""
    return TuningQuality(
        kl_before=1.0,
        kl_after=after,
        kept=kept,
        texts={"handbook_evaluation": (1.0, other)},
        seconds=1.0,
        steps=2,
        best_step=2,
        rollbacks=0,
        gave_up=False,
    )


def test_a_gain_on_the_calibration_text_alone_is_overfitting() -> None:
    (warning,) = overfitting_warnings([block(0.9, 1.02), block(0.8, 0.99)], None)
    assert "block errors on held-out calibration text by 15.1%" in warning
    assert "handbook_evaluation by -0.49%" in warning
    (warning,) = overfitting_warnings([block(0.9, 0.9)], tuning(0.9, 1.01))
    assert "KL on held-out calibration text by 10.0%" in warning
    assert "handbook_evaluation by -1.00%" in warning
    assert len(overfitting_warnings([block(0.9, 1.0)], tuning(0.9, 1.0))) == 2
    assert len(overfitting_warnings([block(0.9, 0.995)], tuning(0.9, 0.995))) == 2


def test_a_gain_everywhere_or_nowhere_is_none() -> None:
    assert not overfitting_warnings([], None)
    assert not overfitting_warnings([block(0.9, 0.98)], tuning(0.9, 0.98))
    assert not overfitting_warnings([block(1.0, 1.0)], tuning(1.0, 1.0, kept=False))
    assert not overfitting_warnings([block(0.9, 1.1), block(0.9, 0.8)], None)


def test_changes_are_geometric_means() -> None:
    assert mean_change([(1.0, 0.5), (4.0, 8.0)]) == pytest.approx(0.0)
    assert mean_change([(2.0, 1.0), (0.0, 0.0)]) == pytest.approx(0.5**0.5 - 1)
    blocks = [block(0.5, 2.0), block(0.5, 8.0)]
    assert held_out_change(blocks) == pytest.approx(-0.5)
    assert text_changes(blocks) == {"handbook_evaluation": pytest.approx(3.0)}


@pytest.mark.parametrize("alike", [True, False])
def test_learning_on_a_narrow_text_is_found_out(alike: bool) -> None:
    """Three tokens again and again: what is learned there fits them, and no other text."""
    model, generator = tiny().model, torch.Generator().manual_seed(1)

    @torch.no_grad()
    def pair(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model.embed(tokens)
        return hidden, model.run_block(0, model.load_block(0), hidden)

    narrow = torch.randint(20, 23, (12, 24), generator=generator)
    low, high = (20, 23) if alike else (30, 250)
    other = torch.randint(low, high, (4, 24), generator=generator)
    data = BlockData(*pair(narrow[:8]), *pair(narrow[8:]), {"handbook_evaluation": pair(other)})
    chosen = replace(LearningSettings.of_mode("rounding"), epochs=20, block_error="plain")
    report = learn_block(model, 0, model.load_block(0), starts(0), data, chosen, seed=0).report
    assert report.kept == "learned"
    assert len(overfitting_warnings([report], None)) == (0 if alike else 1)
