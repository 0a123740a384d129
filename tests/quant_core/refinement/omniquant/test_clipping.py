"""Learnable weight clipping with a width per group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill.models.streamed import weight_of
from bitmill.refinement.omniquant.clipping import LearnedClipping
from bitmill.refinement.omniquant.rows import BlockRows
from learning import starts, tiny

CPU = torch.device("cpu")


def source() -> dict[str, Tensor]:
    model = tiny().model
    return {n: weight_of(m) for n, m in model.linears(model.load_block(0), 0).items()}


def learner(widths: tuple[int, ...]) -> LearnedClipping:
    return LearnedClipping(BlockRows(starts(0, widths), CPU), source())


def test_it_starts_at_nearly_the_whole_range() -> None:
    """Against the published formula, one group of one row at a time."""
    exported = learner((2, 3)).export()
    share = torch.sigmoid(torch.tensor(4.0))
    for name, weight in exported.items():
        w = source()[name][0, :128]
        high, low = share * w.max().clamp(min=0), share * w.min().clamp(max=0)
        scale = ((high - low) / 3).half()
        assert weight.scales[0, 0] == scale
        zero = (-low / scale.float()).round()
        assert weight.zeros[0, 0] == zero
        codes = ((w / scale.float()).round() + zero).clamp(0, 3)
        assert torch.equal(weight.codes[0, :128].float(), codes)


def test_one_bit_keeps_the_mean() -> None:
    """Levels m - a and m + a, a the mean distance from m: up to the rounding of m to eighths."""
    for name, weight in learner((1,)).export().items():
        w = source()[name][3, :128]
        mean = w.mean()
        spread = (w - mean).abs().mean()
        restored = weight.dequantize()[3, :128]
        assert torch.allclose(restored.max() - restored.min(), 2 * spread, rtol=1e-3)
        middle = (restored.max() + restored.min()) / 2
        assert (middle - mean).abs() <= 2 * spread / 16 * 1.01
        assert torch.equal(restored > middle, w > middle)


def test_the_tail_counts_its_own_columns_only() -> None:
    for name, weight in learner((1,)).export().items():
        w = source()[name]
        if w.shape[1] % 128 == 0:
            continue
        tail = w[:, 128:]
        spread = (tail - tail.mean(1, keepdim=True)).abs().mean(1)
        torch.testing.assert_close(weight.scales[1].float(), 2 * spread, rtol=1e-3, atol=1e-6)
        return
    pytest.fail("no linear has a tail")


@pytest.mark.parametrize("widths", [(1, 2), (3, 4)])
def test_what_is_exported_is_what_the_loss_saw(widths: tuple[int, ...]) -> None:
    learned = learner(widths)
    with torch.no_grad():
        learned.upper -= 3.0
        learned.lower -= 4.0
    seen = learned.rows.to_weights(learned(torch.float32).detach())
    for name, weight in learned.export().items():
        assert torch.equal(weight.dequantize(), seen[name])


def test_both_factors_get_gradients_through_scale_and_zero() -> None:
    learned = learner((2, 3))
    learned(torch.float32).square().sum().backward()
    assert (learned.upper.grad != 0).float().mean() > 0.9
    assert (learned.lower.grad != 0).float().mean() > 0.9
