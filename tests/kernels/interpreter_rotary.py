"""Cases for Triton's interpreter: rotations and their gradients against the plain version."""

import pytest
import torch

from bitmill_kernels.rotary.rotary import rotate
from rotations import LAYOUTS, definition, tensors


def both(q, k, cos, sin, backend):
    """Answers and gradients of q and k under the same random ones of the answers."""
    q, k = (x.clone().requires_grad_() for x in (q, k))
    answers = rotate(q, k, cos, sin, backend=backend)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in answers]
    return *answers, *torch.autograd.grad(answers, (q, k), given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"T": 1, "heads": (1, 1)},
        {"d": 20, "heads": (9, 1)},
        {"d": 24, "turned": 6},
        {"d": 16, "turned": 14, "shared": False},
        {"d": 2, "B": 1},
        {"d": 256, "heads": (17, 2), "T": 2},
    ],
    ids=["plain", "one token", "odd halves", "partial", "angles each", "one pair", "many heads"],
)
def test_the_kernel_turns_as_the_plain_version_does(case, layout):
    inputs = tensors(**case, layout=layout)
    for found, plain in zip(both(*inputs, "triton"), both(*inputs, "reference"), strict=True):
        assert torch.allclose(found, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "ulps"), [(torch.float16, 0.5), (torch.bfloat16, 1.0)], ids=["fp16", "bf16"]
)
def test_half_precision_is_rounded_once(dtype, ulps):
    """To the nearest; the interpreter cuts bf16 off."""
    q, k, cos, sin = tensors(d=64, dtype=dtype)
    found = rotate(q, k, cos, sin, backend="triton")
    for y, x in zip(found, (q, k), strict=True):
        exact = definition(x, cos, sin)
        assert y.dtype == dtype
        most = ulps * torch.finfo(dtype).eps * exact.abs() + 1e-6
        assert ((y.double() - exact).abs() <= most).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_lie_in_memory_as_inputs_do(layout):
    q, k, cos, sin = tensors(layout=layout)
    for y, x in zip(rotate(q, k, cos, sin, backend="triton"), (q, k), strict=True):
        assert y.stride() == torch.empty_like(x).stride()


def test_gradients_may_have_any_strides():
    q, k, cos, sin = tensors()
    q.requires_grad_()
    rotate(q, k, cos, sin, backend="triton")[0].sum().backward()
    found, q.grad = q.grad, None
    rotate(q, k, cos, sin, backend="reference")[0].sum().backward()
    assert torch.allclose(found, q.grad, atol=1e-6)


def test_rows_that_overlap_are_turned_too():
    _, k, cos, sin = tensors(B=1, T=4, d=8)
    q = torch.randn(40).as_strided((1, 3, 4, 8), (0, 9, 1, 1))
    found = rotate(q, k, cos, sin, backend="triton")[0]
    assert torch.allclose(found.double(), definition(q, cos, sin), atol=1e-5)


def test_no_tokens_are_turned_into_none():
    q, k, cos, sin = tensors(T=0)
    assert [y.shape for y in rotate(q, k, cos, sin, backend="triton")] == [q.shape, k.shape]
