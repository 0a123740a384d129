"""Method "exllama": GPTQ on the grid of ExLlamaV2."""

from __future__ import annotations

import pytest
import torch

from bitmill.quant.codes import LinearCodes, output_error
from bitmill.quant.exl2_grid import find_steps, row_scales
from bitmill.quant.grid import Grid
from bitmill.quant.tensors import QuantizedWeight
from bitmill.runtime.ranks import SINGLE
from bitmill.solvers.exllama.solver import ExLlamaSolver
from bitmill.solvers.solver import Linear
from bitmill_kernels.layout import group_count


@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 8])
def test_the_loop_loses_less_than_rounding_on_the_same_grid(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    W = 0.02 * torch.randn(64, 160, generator=generator)
    W[3] = 0
    x = torch.randn(400, 160, generator=generator) @ torch.randn(160, 160, generator=generator)
    H = x.T @ x / len(x)
    widths = (width,) * group_count(160)
    (found,) = ExLlamaSolver().solve([Linear("one", W, widths)], H, SINGLE).weights
    assert isinstance(found, QuantizedWeight)
    assert (found.zeros == 1 << (width - 1)).all()
    assert (found.dequantize()[3] == 0).all()
    plain = LinearCodes.nearest(W, Grid(found.scales.float(), found.zeros.float()), widths)
    assert output_error(W - found.dequantize(), H) < 0.9 * output_error(W - plain.values(), H)


def test_steps_are_found_again_where_no_row_has_the_largest() -> None:
    generator = torch.Generator().manual_seed(0)
    for number in (3e-7, 1.1e-5, 0.0007, 0.21):
        k = torch.randint(1, 14, (40,), generator=generator)
        scales = row_scales(number, torch.device("cpu"))[k - 1].half()
        found = find_steps(scales)
        assert found is not None
        again = row_scales(found[0].float(), scales.device)[found[1].long() - 1].half()
        assert torch.equal(again, scales)
    assert find_steps(torch.tensor([0.1, 0.123, 0.0777]).half()) is None
