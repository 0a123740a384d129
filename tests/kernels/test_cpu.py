import logging

import pytest
import torch

from bitmill_kernels import reference
from bitmill_kernels.layout import WIDTHS
from bitmill_kernels.matmul import cpu
from kernel_cases import random_linear

CPU = torch.device("cpu")


@pytest.fixture(params=["compiled", "plain"])
def path(request, monkeypatch):
    cpu.load_library.cache_clear()
    monkeypatch.setenv("BITMILL_CPU_KERNEL", "1" if request.param == "compiled" else "0")
    if request.param == "compiled" and cpu.load_library() is None:
        pytest.skip("no C++ compiler or ninja on this machine")
    yield request.param
    cpu.load_library.cache_clear()


@pytest.fixture
def poisoned():
    """New memory is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("T", [1, 3, 6, cpu.FUSED_TOKENS + 1])
@pytest.mark.parametrize(("N", "K"), [(33, 128), (70, 8 * 128 + 77), (1, 5)])
def test_every_width_and_tail_equals_the_reference(path, T, N, K):
    groups = -(-K // 128)
    widths = tuple((WIDTHS * 2)[:groups]) if groups > 1 else (3,)
    weight, *parts = random_linear(N, K, widths, seed=T, ordered=True)
    x = torch.randn(T, K, generator=torch.Generator().manual_seed(T)) + 0.3
    y = cpu.CpuProduct([weight], CPU)(x, None)
    exact = reference.mixed_matmul(x, *parts, widths, order=weight.order)
    assert ((y.double() - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("T", range(1, cpu.FUSED_TOKENS + 1))
def test_every_number_of_tokens_equals_the_reference(path, T):
    weight, *parts = random_linear(5, 300, (3, 6, 4), seed=T)
    x = torch.randn(T, 300, generator=torch.Generator().manual_seed(T))
    exact = reference.mixed_matmul(x, *parts, (3, 6, 4))
    assert torch.allclose(cpu.CpuProduct([weight], CPU)(x, None).double(), exact, atol=1e-4)


@pytest.mark.parametrize("width", WIDTHS)
def test_tails_of_every_width(path, width):
    for columns in (1, 7, 8, 64, 100):
        weight, *parts = random_linear(9, columns, (width,), seed=columns)
        x = torch.randn(2, columns, generator=torch.Generator().manual_seed(width))
        y = cpu.CpuProduct([weight], CPU)(x, None)
        exact = reference.mixed_matmul(x, *parts, (width,))
        assert torch.allclose(y.double(), exact, atol=1e-4)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("widths", [(0, 3, 0, 0), (2, 0, 0, 1), (0, 0, 0, 0)])
@pytest.mark.parametrize("T", [1, 6, cpu.FUSED_TOKENS + 1])
def test_dropped_groups_add_nothing(path, T, widths):
    weight, *parts = random_linear(33, 401, widths, seed=T, ordered=True)
    x = torch.randn(T, 401, generator=torch.Generator().manual_seed(T)) + 0.3
    product = cpu.CpuProduct([weight], CPU)
    exact = reference.dequantize(*parts, widths).double()
    packed = x.double()[:, weight.order.long()]
    assert torch.allclose(product(x, None).double(), packed @ exact.T, atol=1e-4)
    source = torch.empty_like(exact)
    source[:, weight.order.long()] = exact
    dy = torch.randn(T, 33, generator=torch.Generator().manual_seed(T))
    assert torch.allclose(product.input_gradient(dy).double(), dy.double() @ source, atol=1e-4)


def test_a_scale_below_the_smallest_normal_half_counts(path):
    weight, codes, scales, zeros = random_linear(4, 128, (4,))
    scales.fill_(2.0**-20)
    x = torch.ones(1, 128)
    y = cpu.CpuProduct([weight], CPU)(x, None)
    exact = reference.mixed_matmul(x, codes, scales, zeros, (4,))
    assert torch.allclose(y.double(), exact, rtol=1e-4)


def test_the_choice_is_logged_once(monkeypatch, caplog):
    cpu.load_library.cache_clear()
    monkeypatch.setenv("BITMILL_CPU_KERNEL", "0")
    weight, *_ = random_linear(4, 128, (4,))
    with caplog.at_level(logging.INFO, logger="bitmill_kernels.matmul.cpu"):
        for _ in range(3):
            cpu.CpuProduct([weight], CPU)
    cpu.load_library.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "packed linears on the CPU unpack tiles with torch: BITMILL_CPU_KERNEL is 0"
    ]
