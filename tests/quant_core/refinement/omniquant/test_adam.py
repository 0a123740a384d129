"""Adam with held-out choice, rollback and halved rates."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bitmill.refinement.omniquant.adam import DescentSettings, Rate, descend


def parabola(start: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor([start]))


def test_the_best_held_out_parameters_remain() -> None:
    """Training pulls to 0, held-out data likes 1: descending from 2 passes it."""
    x = parabola(2.0)
    report = descend(
        [Rate([x], 0.1)],
        lambda _: None,
        lambda: x.square().sum(),
        lambda: float((x.detach() - 1).square()),
        DescentSettings(steps=40, evaluate_every=1, cosine=False),
    )
    assert abs(x.item() - 1.0) < 0.1
    assert 0 < report.best_step < 40
    assert report.after == min(value for _, value in report.curve)
    assert report.after == pytest.approx((x.item() - 1) ** 2)


def test_a_start_that_cannot_be_improved_is_kept_exactly() -> None:
    x = parabola(0.3)
    report = descend(
        [Rate([x], 0.1)],
        lambda _: None,
        lambda: x.sum(),
        lambda: float((x.detach() - 0.3).abs()),
        DescentSettings(steps=10, evaluate_every=5),
    )
    assert torch.equal(x.detach(), torch.tensor([0.3]))
    assert report.best_step == 0
    assert report.after == report.before


def test_a_non_finite_loss_rolls_back_and_halves_the_rate() -> None:
    x = parabola(2.0)
    visited: list[float] = []
    drawn: list[int] = []

    def loss() -> Tensor:
        visited.append(x.item())
        return x.square().sum() * (math.nan if drawn[-1] == 3 else 1.0)

    report = descend(
        [Rate([x], 0.1)],
        drawn.append,
        loss,
        lambda: float(x.detach().square()),
        DescentSettings(steps=8, evaluate_every=2, cosine=False),
    )
    assert report.rollbacks == 1
    assert not report.gave_up
    assert visited[4] == pytest.approx(visited[2])
    assert visited[1] - visited[0] == pytest.approx(-0.1, rel=1e-3)
    assert visited[5] - visited[4] == pytest.approx(-0.05, rel=1e-3)
    assert math.isfinite(x.item())


def test_it_gives_up_after_repeated_divergence() -> None:
    x = parabola(1.0)
    report = descend(
        [Rate([x], 10.0)],
        lambda _: None,
        lambda: -x.square().sum(),
        lambda: float(x.detach().square()),
        DescentSettings(steps=100, evaluate_every=1, cosine=False, max_rollbacks=2),
    )
    assert report.gave_up
    assert report.rollbacks == 3
    assert x.item() == 1.0


def test_a_non_finite_start_is_left_alone() -> None:
    x = parabola(1.0)
    report = descend(
        [Rate([x], 0.1)],
        lambda _: None,
        lambda: x.sum(),
        lambda: math.nan,
        DescentSettings(steps=5, evaluate_every=1),
    )
    assert report.gave_up
    assert report.steps == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_steps_are_the_ordinary_ones() -> None:
    """On changing data, with a decaying rate and a rollback on the way."""
    ends = []
    for record in (False, True):
        x = nn.Parameter(torch.linspace(-1, 1, 64, device="cuda"))
        target = torch.zeros(64, device="cuda")

        def draw(step: int, target: Tensor = target) -> None:
            target.copy_(torch.full((64,), math.nan if step == 6 else step / 10))

        def loss(x: Tensor = x, target: Tensor = target) -> Tensor:
            return (x - target).square().sum()

        report = descend(
            [Rate([x], 0.05)],
            draw,
            loss,
            lambda x=x: float((x.detach() - 1).square().sum()),
            DescentSettings(steps=30, evaluate_every=5),
            record=record,
        )
        assert report.recorded == record
        assert report.rollbacks == 1
        ends.append(x.detach().cpu())
    torch.testing.assert_close(ends[0], ends[1])
