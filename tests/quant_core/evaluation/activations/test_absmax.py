"""Rule "absmax": the grid of int8 products."""

from __future__ import annotations

import torch

from bitmill.evaluation.activations.absmax import AbsMax
from bitmill.evaluation.activations.grids import symmetric_tokens
from bitmill.evaluation.activations.rule import LinearInputs


def test_zero_is_on_every_token_s_grid() -> None:
    x = torch.randn(3, 9, 40, generator=torch.Generator().manual_seed(0)) + 3
    x[..., ::7] = 0
    found = AbsMax().rounded(x, 8, LinearInputs(torch.empty(0, dtype=torch.int64)))
    assert torch.equal(found, symmetric_tokens(x, 8))
    assert (found[..., ::7] == 0).all()
    step = x.abs().amax(-1, keepdim=True) / 127
    assert torch.allclose(found / step, (found / step).round(), atol=1e-3)
    assert ((found - x).abs() <= 0.501 * step).all()
