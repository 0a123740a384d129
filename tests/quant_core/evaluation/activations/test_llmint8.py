"""Rule "llmint8": columns with an outlier in any token stay as they are."""

from __future__ import annotations

import torch

from bitmill.evaluation.activations.grids import symmetric_tokens
from bitmill.evaluation.activations.llmint8 import LLMInt8
from bitmill.evaluation.activations.rule import LinearInputs

NONE = LinearInputs(torch.empty(0, dtype=torch.int64))


def test_columns_of_six_or_more_in_any_token_are_kept_and_take_no_part_in_grids() -> None:
    x = torch.tensor([[[0.3, 6.0, 7.0, 5.9, -3], [0.4, 0.1, 1.4, 0.2, 0.6]]])
    found = LLMInt8().rounded(x, 4, NONE)
    assert torch.equal(found[..., [1, 2]], x[..., [1, 2]])
    others = [0, 3, 4]
    assert torch.equal(found[..., others], symmetric_tokens(x[..., others], 4))
    assert not torch.equal(found[..., others], symmetric_tokens(x, 4)[..., others])


def test_tokens_of_another_call_do_not_count() -> None:
    x = torch.tensor([[0.3, 1.0, -3], [0.4, 60, 0.6]])
    first = LLMInt8().rounded(x[:1], 4, NONE)
    assert torch.equal(first, symmetric_tokens(x[:1], 4))
    assert LLMInt8().rounded(x[:1].half(), 4, NONE).dtype == torch.float16


def test_inputs_that_are_all_outliers_stay_as_they_are() -> None:
    x = torch.tensor([[6.5, -7.1], [0.1, 0.2]])
    assert torch.equal(LLMInt8().rounded(x, 8, NONE), x)
