"""Rule "quik": inputs of outlier columns stay as they are."""

from __future__ import annotations

import torch

from bitmill.evaluation.activations.grids import rounded_tokens
from bitmill.evaluation.activations.quik import QUIK
from bitmill.evaluation.activations.rule import LinearInputs
from bitmill.quant.outliers import Outliers, outlier_inputs
from bitmill.quant.rewrites import NO_REWRITES, ColumnOrder, Rewrites


def test_outlier_columns_are_kept_and_take_no_part_in_grids() -> None:
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    x[..., 7] *= 50
    found = QUIK().rounded(x, 4, LinearInputs(torch.tensor([7, 2])))
    assert torch.equal(found[..., [7, 2]], x[..., [7, 2]])
    others = [k for k in range(12) if k not in (7, 2)]
    assert torch.equal(found[..., others], rounded_tokens(x[..., others], 4))
    without = QUIK().rounded(x, 4, LinearInputs(torch.empty(0, dtype=torch.int64)))
    assert torch.equal(without, rounded_tokens(x, 4))
    all_of_them = LinearInputs(torch.arange(12))
    assert torch.equal(QUIK().rounded(x.half(), 4, all_of_them), x.half())


def test_columns_are_those_of_the_source() -> None:
    """Where undoing a linear's rewrites puts the values that it stores in 16 bits."""
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1)).int()
    stored = Outliers(torch.tensor([3, 11, 0], dtype=torch.int32), torch.ones(2, 3).half())
    for rewrites in (Rewrites([stored]), Rewrites([ColumnOrder(order), stored])):
        values = rewrites.undo(torch.zeros(2, 20))
        assert sorted(outlier_inputs(rewrites).tolist()) == values[0].nonzero()[:, 0].tolist()
    assert outlier_inputs(NO_REWRITES).tolist() == []
