import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3

from bitmill_kernels.rotary.rotary import fits, rotate
from rotations import LAYOUTS, definition, tensors


@pytest.mark.parametrize("shared", [True, False], ids=["one angle", "angles each"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotations_are_those_of_a_llama_byte_for_byte(layout, shared):
    inputs = tensors(layout=layout, shared=shared)
    for found, expected in zip(rotate(*inputs), llama(*inputs), strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


def test_columns_behind_the_angles_pass_through():
    inputs = tensors(d=24, turned=6)
    for found, expected in zip(rotate(*inputs), phi3(*inputs), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    q, k, cos, sin = tensors(d=64, dtype=dtype)
    for y, x in zip(rotate(q, k, cos, sin), (q, k), strict=True):
        exact = definition(x, cos, sin)
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("turned", [8, 4])
def test_gradients_are_those_of_the_definition(turned):
    q, k, cos, sin = tensors(T=3, d=8, turned=turned, dtype=torch.float64)
    q, k = q.requires_grad_(), k.requires_grad_()
    torch.autograd.gradcheck(lambda q, k: rotate(q, k, cos, sin), (q, k))
    found = torch.autograd.grad(rotate(q, k, cos, sin)[0].square().sum(), q)[0]
    expected = torch.autograd.grad(definition(q, cos, sin).square().sum(), q)[0]
    assert torch.allclose(found, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q[0], k[0], cos, sin),
        lambda q, k, cos, sin: (q, k[:, :, 1:], cos, sin),
        lambda q, k, cos, sin: (q, k[:1], cos, sin),
        lambda q, k, cos, sin: (q, k, cos[:, :1], sin[:, :1]),
        lambda q, k, cos, sin: (q, k, cos[..., :5], sin[..., :5]),
        lambda q, k, cos, sin: (q, k, cos[..., :4], sin),
        lambda q, k, cos, sin: (q[..., :8], k[..., :8], cos, sin),
        lambda q, k, cos, sin: (q, k, cos.expand(3, -1, -1), sin.expand(3, -1, -1)),
    ],
    ids=["3-D", "tokens", "batch", "one angle", "odd", "sines", "narrow", "angles"],
)
def test_shapes_that_do_not_fit_are_refused(change):
    inputs = tensors()
    assert fits(*inputs)
    changed = change(*inputs)
    assert not fits(*changed)
    with pytest.raises(ValueError, match="give"):
        rotate(*changed)
