"""All linears of a block as rows of one matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitmill.errors import ModelError, NumericalError
from bitmill.models.streamed import weight_of
from bitmill.refinement.omniquant.rows import BlockRows, learnable
from learning import block_data, starts, tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize("order", [False, True])
def test_codes_and_grids_return_as_they_came(order: bool) -> None:
    weights = starts(0, (1, 3), order=order)
    rows = BlockRows(weights, CPU)
    scale, zero = rows.of_grids(weights)
    back = rows.export(rows.of_codes(weights).float(), scale, zero)
    for name, weight in weights.items():
        assert torch.equal(back[name].codes, weight.codes)
        assert torch.equal(back[name].scales, weight.scales)
        assert torch.equal(back[name].zeros, weight.zeros)
        assert back[name].widths == weight.widths
        assert (back[name].order is None) == (not order)
        assert torch.equal(back[name].dequantize(), weight.dequantize())


@pytest.mark.parametrize("order", [False, True])
def test_weights_and_their_gradients_return_in_source_order(order: bool) -> None:
    model = tiny().model
    source = {n: weight_of(m) for n, m in model.linears(model.load_block(0), 0).items()}
    rows = BlockRows(starts(0, order=order), CPU)
    flat = rows.of_weights(source).requires_grad_()
    back = rows.to_weights(flat)
    for name, weight in source.items():
        assert torch.equal(back[name], weight)
    sum((back[n] * source[n]).sum() for n in source).backward()
    assert torch.equal(flat.grad, flat.detach())


def test_limits_follow_the_width_of_each_group() -> None:
    weights = starts(0, (1, 4))
    rows = BlockRows(weights, CPU)
    first = rows.linears[0]
    largest = rows.largest[first.rows].view(first.N, first.groups)
    assert largest.unique(dim=0).tolist() == [[1.0, 15.0]]
    assert rows.zero_top[first.rows][0].item() == 15 / 8
    assert rows.columns[first.rows].view(first.N, -1)[0].tolist() == [128.0, 32.0]


def test_a_scale_beyond_fp16_is_refused() -> None:
    weights = starts(0)
    rows = BlockRows(weights, CPU)
    scale, zero = rows.of_grids(weights)
    with pytest.raises(NumericalError, match="does not fit fp16"):
        rows.export(rows.of_codes(weights).float(), scale * 1e9, zero)


def test_learnable_linears_compute_the_same_and_leave() -> None:
    model, data = tiny().model, block_data()
    block = model.load_block(0)
    linears = model.linears(block, 0)
    with learnable(block, linears) as slots:
        for name, module in linears.items():
            slots[name].weight = weight_of(module)
        output = model.run_block(0, block, data.inputs)
    torch.testing.assert_close(output, data.targets)
    assert model.linears(block, 0) == linears


def test_a_linear_outside_the_block_is_refused() -> None:
    block = tiny().model.load_block(0)
    with (
        pytest.raises(ModelError, match=r"other.*not a module of its own"),
        learnable(block, {"other": nn.Linear(2, 2)}),
    ):
        pass
