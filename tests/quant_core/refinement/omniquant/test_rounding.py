"""Learnable scales, zero points and positions before rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill.models.streamed import weight_of
from bitmill.quant.tensors import QuantizedWeight
from bitmill.refinement.omniquant.rounding import LearnedRounding, rounded, start_positions
from bitmill.refinement.omniquant.rows import BlockRows
from learning import starts, tiny

CPU = torch.device("cpu")


def source(index: int = 0) -> dict[str, Tensor]:
    model = tiny().model
    return {n: weight_of(m) for n, m in model.linears(model.load_block(index), index).items()}


def learner(
    widths: tuple[int, ...], **changes: bool
) -> tuple[dict[str, QuantizedWeight], LearnedRounding]:
    weights = starts(0, widths, order=True)
    return weights, LearnedRounding(BlockRows(weights, CPU), weights, source(), **changes)


@pytest.mark.parametrize("widths", [(1, 2), (3, 6), (8, 4)])
def test_it_starts_from_the_given_codes(widths: tuple[int, ...]) -> None:
    weights, learned = learner(widths)
    exported = learned.export()
    for name, weight in weights.items():
        assert torch.equal(exported[name].codes, weight.codes)
        assert torch.equal(exported[name].zeros, weight.zeros)
        assert torch.equal(exported[name].scales, weight.scales)


@pytest.mark.parametrize("widths", [(1, 2), (3, 6)])
def test_what_is_exported_is_what_the_loss_saw(widths: tuple[int, ...]) -> None:
    _, learned = learner(widths)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter += 0.4 * torch.rand(parameter.shape, generator=generator) - 0.2
    seen = learned.rows.to_weights(learned(torch.float32).detach())
    for name, weight in learned.export().items():
        assert torch.equal(weight.dequantize(), seen[name])


def test_positions_start_beside_the_float_weight() -> None:
    codes = torch.tensor([[0, 1, 1, 1, 3, 3]], dtype=torch.uint8)
    weight = torch.tensor([[-9.0, 0.2, 1.4, -0.7, 2.3, 1.2]])
    one, zero, largest = torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), 3.0)
    position = start_positions(codes, weight, one, zero, largest)
    torch.testing.assert_close(position, torch.tensor([[-4.0, 0.2, 0.0, -0.3, 2.3, 1.8]]))


def test_the_gradient_of_the_scale_is_exact_where_codes_stay() -> None:
    """Against a finite difference."""
    _, learned = learner((1, 4))
    position, zero = learned.position.detach(), learned.zero.detach()
    direction = torch.randn(position.shape, generator=torch.Generator().manual_seed(1))

    def value(scale: Tensor) -> Tensor:
        limits = learned.rows.largest, learned.rows.one_bit
        weight = rounded(position, scale, zero, *limits, torch.float32)
        return (weight * direction).sum(1, keepdim=True)

    scale = torch.ones_like(zero).requires_grad_()
    value(scale).sum().backward()
    slope = value(torch.full_like(zero, 2.0)) - value(torch.ones_like(zero))
    torch.testing.assert_close(scale.grad, slope)


def test_a_code_at_its_end_lets_only_inward_gradients_through() -> None:
    position = torch.tensor([[-3.0, -3.0, 0.0, 5.0, 5.0]], requires_grad=True)
    scale = torch.full((1, 1), 2.0, requires_grad=True)
    zero = torch.ones(1, 1, requires_grad=True)
    largest, one_bit = torch.full((1, 1), 3.0), torch.zeros(1, 1, dtype=torch.bool)
    weight = rounded(position, scale, zero, largest, one_bit, torch.float32)
    weight.backward(torch.tensor([[1.0, -2.0, 1.0, 3.0, -5.0]]))
    assert weight.tolist() == [[-2.0, -2.0, 0.0, 4.0, 4.0]]
    assert position.grad.tolist() == [[0.0, -4.0, 2.0, 6.0, 0.0]]
    assert scale.grad.item() == -1.0 + 2.0 + 6.0 - 10.0
    assert zero.grad.item() == -2.0 * (1.0 - 2.0 + 3.0 - 5.0)


def test_at_one_bit_the_zero_point_moves_both_levels() -> None:
    zero = torch.full((1, 1), 0.5, requires_grad=True)
    weight = rounded(
        torch.tensor([[-0.5, 0.5]]),
        torch.full((1, 1), 2.0),
        zero,
        torch.ones(1, 1),
        torch.ones(1, 1, dtype=torch.bool),
        torch.float32,
    )
    weight.backward(torch.tensor([[1.0, 2.0]]))
    assert weight.tolist() == [[-1.0, 1.0]]
    assert zero.grad.item() == -6.0


def test_frozen_roundings_get_no_gradient() -> None:
    _, learned = learner((2, 3), roundings=False)
    learned(torch.float32).square().sum().backward()
    assert learned.position.grad is None
    assert learned.ratio.grad is not None


def test_rows_of_scale_zero_stay_zero() -> None:
    weights, _ = learner((2,))
    name, first = next(iter(weights.items()))
    scales, zeros, codes = first.scales.clone(), first.zeros.clone(), first.codes.clone()
    scales[0, 0], zeros[0, 0], codes[0, :128] = 0.0, 0, 0
    weights[name] = QuantizedWeight(codes, scales, zeros, first.widths, first.rewrites)
    learned = LearnedRounding(BlockRows(weights, CPU), weights, source())
    with torch.no_grad():
        learned.zero += 1.0
    learned(torch.float32).sum().backward()
    assert torch.isfinite(learned.position.grad).all()
    exported = learned.export()[name]
    assert exported.scales[0, 0] == 0
    assert exported.zeros[0, 0] == 0
    assert not exported.codes[0, :128].any()
