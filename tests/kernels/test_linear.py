import gc

import pytest
import torch

from bitmill_kernels import reference
from bitmill_kernels.matmul.linear import MixedLinear
from bitmill_kernels.matmul.runtime import PackedWeight
from kernel_cases import random_linear

CPU = torch.device("cpu")


def relative_error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (40,)])
def test_cpu_product_with_order_and_bias(dtype, shape):
    widths = (3, 2, 8, 1, 5)
    weight, *parts = random_linear(300, 600, widths, seed=1, ordered=True)
    linear = MixedLinear([weight], CPU)
    x = torch.randn(*shape, 600, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.randn(300, generator=torch.Generator().manual_seed(3)).to(dtype)
    y = linear(x, bias)
    exact = reference.mixed_matmul(
        x.reshape(-1, 600), *parts, widths, order=weight.order, bias=bias
    )
    assert y.shape == (*shape, 300)
    assert y.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 5e-3
    assert relative_error(y.reshape(-1, 300), exact) < limit


def test_stacked_linears_give_their_outputs_side_by_side():
    a, *a_parts = random_linear(10, 200, (3, 2), seed=1, ordered=True)
    b, *b_parts = random_linear(7, 200, (4, 8), seed=2)
    b = PackedWeight(b.tensors, b.widths, 7, 200, a.order)
    stack = MixedLinear([a, b], CPU)
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(2))
    first, second = stack(x).split(stack.outputs, dim=-1)
    assert relative_error(first, reference.mixed_matmul(x, *a_parts, (3, 2), order=a.order)) < 1e-5
    assert relative_error(second, reference.mixed_matmul(x, *b_parts, (4, 8), order=a.order)) < 1e-5


def test_the_reference_backend_is_the_dense_product_bit_for_bit(monkeypatch):
    weight, *parts = random_linear(30, 300, (3, 2, 8), seed=1, ordered=True)
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(2)).bfloat16()
    source = torch.empty(30, 300)
    source[:, weight.order.long()] = reference.dequantize(*parts, (3, 2, 8))
    expected = torch.nn.functional.linear(x, source.bfloat16())
    assert torch.equal(MixedLinear([weight], CPU, backend="reference")(x), expected)
    monkeypatch.setenv("BITMILL_BACKEND", "reference")
    assert torch.equal(MixedLinear([weight], CPU)(x), expected)


def test_the_operator_passes_torchs_own_checks():
    weight, *_ = random_linear(10, 200, (3, 2), seed=1)
    linear = MixedLinear([weight], CPU)
    x = torch.randn(2, 200)
    arguments = (x, torch.zeros(10), linear.name, 10)
    torch.library.opcheck(torch.ops.bitmill.mixed_linear.default, arguments)


BACKENDS = ["auto", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (2, 3), (40,)])
def test_gradients_are_those_of_the_dequantized_weight(backend, dtype, shape):
    a, *a_parts = random_linear(300, 600, (3, 2, 8, 1, 5), seed=1, ordered=True)
    b, *b_parts = random_linear(7, 600, (4, 8, 2, 2, 6), seed=2)
    b = PackedWeight(b.tensors, b.widths, 7, 600, a.order)
    linear = MixedLinear([a, b], CPU, backend=backend)
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(*shape, 600, generator=draw).to(dtype).requires_grad_()
    bias = torch.randn(307, generator=draw).to(dtype).requires_grad_()
    dy = torch.randn(*shape, 307, generator=draw).to(dtype)
    y = linear(x, bias)
    del linear  # the module may have moved, and dropped its layout, before the gradient comes
    y.backward(dy)
    packed = [
        reference.dequantize(*parts, one.widths) for one, parts in ((a, a_parts), (b, b_parts))
    ]
    source = torch.empty(307, 600, dtype=torch.float64)
    source[:, a.order.long()] = torch.cat(packed).double()
    limit = 1e-5 if dtype == torch.float32 else 5e-3
    assert x.grad.dtype == dtype
    assert relative_error(x.grad, dy.double() @ source) < limit
    assert relative_error(bias.grad, dy.double().view(-1, 307).sum(0)) < 1e-2


def test_second_derivatives_and_torchs_own_checks_of_the_gradient():
    weight, *parts = random_linear(10, 200, (3, 2), seed=1)
    linear = MixedLinear([weight], CPU)
    exact = reference.dequantize(*parts, (3, 2)).double()
    x = torch.randn(2, 200, requires_grad=True)
    (dx,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.sum(), x)
    assert relative_error(second, 2 * torch.ones(2, 200).double() @ exact.T @ exact) < 1e-5
    arguments = (torch.randn(2, 10, requires_grad=True), linear.name, 200)
    torch.library.opcheck(torch.ops.bitmill.mixed_linear_input_gradient.default, arguments)
    arguments = (torch.randn(2, 200, requires_grad=True), None, linear.name, 10)
    torch.library.opcheck(torch.ops.bitmill.mixed_linear.default, arguments)


def test_an_input_of_the_wrong_width_is_refused():
    weight, *_ = random_linear(10, 200, (3, 2))
    with pytest.raises(ValueError, match="x has 100 columns: the weight has 200"):
        MixedLinear([weight], CPU)(torch.randn(2, 100))


def test_a_name_belongs_to_one_linear_and_is_found_again():
    weight, *_ = random_linear(10, 200, (3, 2))
    linear = MixedLinear([weight], CPU, name="model.layers.0.mlp.up_proj")
    x = torch.randn(2, 200, generator=torch.Generator().manual_seed(2))
    named = torch.ops.bitmill.mixed_linear(x, None, "model.layers.0.mlp.up_proj", 10)
    assert torch.equal(named, linear(x))
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj' is in use"):
        MixedLinear([weight], CPU, name=linear.name)
    name, unnamed = linear.name, MixedLinear([weight], CPU)
    assert unnamed.name != name
    del linear
    gc.collect()
    with pytest.raises(
        LookupError, match=r"no packed linear is named 'model.layers.0.mlp.up_proj'"
    ):
        torch.ops.bitmill.mixed_linear(x, None, name, 10)
