"""Rounding inside a loss, with the gradient of what is rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight(x: Tensor, value: Tensor) -> Tensor:
    """`value` bit for bit, with the gradient of x (straight-through estimator, arXiv 1308.3432)."""
    result: Tensor = _Straight.apply(x, value)
    return result


class _Straight(torch.autograd.Function):
    """The second argument's value with the first one's gradient, bit for bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
