"""Cases for Triton's interpreter; run by `test_interpreter.py` in a process of its own."""

import pytest
import torch

from bitmill_kernels import reference
from bitmill_kernels.matmul.linear import MixedLinear
from kernel_cases import random_linear


@pytest.mark.parametrize("T", [1, 17, 65])
def test_every_range_of_tokens_gives_the_same_product(T):
    widths = (3, 4, 2)
    weight, *parts = random_linear(70, 300, widths, seed=1, ordered=True)
    linear = MixedLinear([weight], torch.device("cpu"), backend="triton")
    x = torch.randn(T, 300, generator=torch.Generator().manual_seed(T)).half()
    bias = torch.randn(70, generator=torch.Generator().manual_seed(T)).half()
    y = linear(x, bias)
    exact = reference.mixed_matmul(x, *parts, widths, order=weight.order, bias=bias)
    assert ((y.double() - exact).norm() / exact.norm()) < 1e-3


def test_the_gradient_comes_from_dequantized_runs():
    widths = (3, 4, 2)
    weight, *parts = random_linear(70, 300, widths, seed=1, ordered=True)
    linear = MixedLinear([weight], torch.device("cpu"), backend="triton")
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)).half().requires_grad_()
    dy = torch.randn(5, 70, generator=torch.Generator().manual_seed(2)).half()
    linear(x).backward(dy)
    source = torch.empty(70, 300, dtype=torch.float64)
    source[:, weight.order.long()] = reference.dequantize(*parts, widths).double()
    exact = dy.double() @ source
    assert ((x.grad.double() - exact).norm() / exact.norm()) < 1e-3
