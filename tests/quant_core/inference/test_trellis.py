"""The module of trellis codes takes and refuses the same shapes as a plain linear."""

from __future__ import annotations

import pytest
import torch

from bitmill.inference.trellis import TrellisLinear


def module_of(N: int, K: int, rates: tuple[int, ...]) -> TrellisLinear:
    module = TrellisLinear(K, N, rates)
    draw = torch.Generator().manual_seed(0)
    for key, buffer in module.named_buffers():
        codes = key.startswith("codes")
        buffer.copy_(
            torch.randint(256, buffer.shape, generator=draw, dtype=torch.uint8)
            if codes
            else torch.rand(buffer.shape, generator=draw)
        )
    return module


@pytest.mark.parametrize("columns", [1, 296, 304], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 9], ids=str)
def test_inputs_of_another_width_are_refused(columns: int, tokens: int) -> None:
    module = module_of(48, 300, (3, 4, 2))
    with pytest.raises(ValueError, match=f"x has {columns} columns: the weight has 300"):
        module(torch.ones(tokens, columns))


@pytest.mark.parametrize("shape", [(300,), (0, 300), (2, 0, 300), (2, 5, 300)], ids=str)
def test_outputs_have_the_shape_of_their_inputs(shape: tuple[int, ...]) -> None:
    module = module_of(48, 300, (3, 4, 2))
    x = torch.ones(shape, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 48)
    assert x.grad is not None
    assert x.grad.shape == shape
    torch.testing.assert_close(y, x @ module.dequantize().t(), atol=1e-4, rtol=1e-4)
