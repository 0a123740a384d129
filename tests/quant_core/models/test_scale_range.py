"""Weights whose scales fp16 cannot hold are told before anything is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitmill.errors import ModelError
from bitmill.models.scale_range import ScaleRange
from bitmill.plan.model_plan import PlannedLinear, Source

WIDTHS = (2, 3, 4)


def linear(name: str, *, transposed: bool = False) -> PlannedLinear:
    source = Source(tensor=f"{name}.weight", index=None, rows=None, transposed=transposed)
    return PlannedLinear(name=name, block=0, rows=4, columns=8, dtype="F32", source=source)


def looked(weight: Tensor, *, widths: tuple[int, ...] = WIDTHS, transposed: bool = False) -> list:
    found = ScaleRange.of([linear("a.b", transposed=transposed)], widths)
    found.look("a.b.weight", weight)
    return found.notes()


def weights(low: float, high: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """A 4 x 8 matrix whose row 2 reaches from low to high."""
    W = torch.full((4, 8), 0.01)
    W[2, 3], W[2, 5] = low, high
    return W.to(dtype)


@pytest.mark.parametrize(
    ("low", "high", "widths"),
    [
        (0.0, 65504.0 * 3 * 1.01, (2, 3)),
        (-65504.0 * 3 * 1.01, 0.0, (2, 3)),
        (-65504.0 * 2, 65504.0 * 2, (2,)),
        (1.0, 70000.0, (1, 8)),
        (0.0, 65504.0 * 255 * 1.01, (8,)),
        (0.0, 3e38, (2,)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_beyond_fp16_are_refused(
    low: float, high: float, widths: tuple[int, ...], dtype: torch.dtype
) -> None:
    with pytest.raises(ModelError, match="fp16 holds 65504") as refused:
        looked(weights(low, high, dtype=dtype), widths=widths)
    assert (refused.value.code, refused.value.param) == ("scale_overflow", "a.b")


def test_what_fp16_just_holds_is_taken_in_silence() -> None:
    assert looked(weights(-65504.0, 65504.0)) == []
    assert looked(weights(0.0, 65504.0 * 3)) == []
    assert looked(torch.full((4, 8), 15 * 6.2e-5)) == []
    assert looked(torch.zeros(4, 8)) == []


@pytest.mark.parametrize("largest", [1e-7, 1e-12, 1e-38, 4e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_become_zero_are_counted(largest: float, dtype: torch.dtype) -> None:
    (note,) = looked(torch.full((4, 8), largest, dtype=dtype))
    assert note.startswith("weights in 4 rows of 1 linears are too small")
    assert "first 4 rows of a.b" in note
    one = weights(0, 0.5)
    one[1] = largest
    assert looked(one)[0].startswith("weights in 1 rows of 1 linears")


@pytest.mark.parametrize("largest", [1e-6, 1e-5, 8e-4])
def test_scales_with_few_digits_are_told(largest: float) -> None:
    (note,) = looked(torch.full((4, 8), largest))
    assert note.startswith("all scales of 1 linears lie below fp16's normal range")


def test_rows_are_those_of_the_linear_however_it_is_stored() -> None:
    W = weights(0.0, 0.5)
    W[0] = 1e-9
    assert looked(W.T.contiguous(), transposed=True) == looked(W)
    stack = torch.stack([W, torch.ones(4, 8)])
    assert looked(stack)[0].startswith("weights in 1 rows")


def test_other_tensors_count_nothing() -> None:
    found = ScaleRange.of([linear("a.b")], WIDTHS)
    found.look("a.norm.weight", torch.full((8,), 1e30))
    assert found.notes() == []
