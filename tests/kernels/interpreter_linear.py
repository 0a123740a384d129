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


@pytest.mark.parametrize("T", [1, 17, 65])
def test_dropped_groups_and_linears_add_nothing(T):
    K = 500
    stack = [
        random_linear(70, K, (0, 3, 0, 2), seed=1),
        random_linear(20, K, (0, 0, 0, 0), seed=2),
        random_linear(9, K, (4, 0, 0, 0), seed=3),
    ]
    linear = MixedLinear([weight for weight, *_ in stack], torch.device("cpu"), backend="triton")
    before = MixedLinear([random_linear(99, K, (8,) * 4)[0]], torch.device("cpu"), backend="triton")
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(T)).half().requires_grad_()
    bias = torch.randn(99, generator=torch.Generator().manual_seed(T)).half()
    before(x)  # leaves its own weights in the scratch that both dequantize into
    y = linear(x, bias)
    source = torch.cat([reference.dequantize(*parts, w.widths).double() for w, *parts in stack])
    exact = x.double() @ source.T + bias.double()
    assert ((y.double() - exact).norm() / exact.norm()) < 1e-3
    dy = torch.randn(T, 99, generator=torch.Generator().manual_seed(2)).half()
    y.backward(dy)
    exact = dy.double() @ source
    assert ((x.grad.double() - exact).norm() / exact.norm()) < 1e-3
    assert not x.grad[:, 128:256].eq(0).all()


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
