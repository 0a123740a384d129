"""Rotations on a CUDA device against fp64; answers are poisoned before they are written."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

from bitmill_kernels.rotary.rotary import rotate
from rotations import LAYOUTS, definition, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))


def cuda(**case):
    return (x.cuda() if x.is_contiguous() else on_cuda(x) for x in tensors(**case))


def on_cuda(x):
    """A copy that keeps the strides of a view."""
    base = x._base if x._base is not None else x
    return base.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def missed(found, exact):
    return float((found.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        {"T": 33, "d": 128, "heads": (32, 8)},
        {"T": 257, "d": 80, "heads": (7, 7)},
        {"T": 1, "d": 64, "heads": (1, 1), "shared": False},
        {"T": 19, "d": 96, "turned": 40, "heads": (12, 3)},
        {"T": 5, "d": 256, "heads": (71, 1), "shared": False},
    ],
    ids=["grouped", "odd", "one token", "partial", "many heads"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_answers_and_gradients_are_those_of_fp64(case, layout, dtype):
    q, k, cos, sin = cuda(**case, layout=layout, dtype=dtype)
    q, k = q.requires_grad_(), k.requires_grad_()
    answers = rotate(q, k, cos, sin)
    given = [torch.randn_like(y) for y in answers]
    gradients = torch.autograd.grad(answers, (q, k), given)
    most = (0.5 if dtype == torch.float32 else 0.35) * torch.finfo(dtype).eps
    for x, y, dy, dx in zip((q, k), answers, given, gradients, strict=True):
        wide = x.detach().double().requires_grad_()
        exact = definition(wide, cos, sin)
        assert y.dtype == dx.dtype == dtype
        assert y.stride() == torch.empty_like(x).stride()
        assert missed(y, exact.detach()) <= most
        assert missed(dx, torch.autograd.grad(exact, wide, dy.double())[0]) <= most


def test_a_llama_shape_is_turned_better_than_operation_by_operation():
    q, k, cos, sin = cuda(B=4, T=2047, d=128, heads=(32, 32), dtype=torch.bfloat16)
    ours, theirs = rotate(q, k, cos, sin), llama(q, k, cos, sin)
    for x, y, other in zip((q, k), ours, theirs, strict=True):
        exact = definition(x, cos, sin)
        assert y.stride() == other.stride()
        assert missed(y, exact) <= missed(other, exact)


@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "head", "token"])
def test_offsets_past_31_bits(dimension):
    """Two rows, one past 2^31 elements, along each dimension in turn."""
    far = 2**31 + 128
    storage = torch.zeros(far + 128, dtype=torch.bfloat16, device="cuda")
    storage[:128].normal_()
    storage[far:].normal_()
    q = storage.as_strided((2, 1, 1, 128), (far, 128, 128, 1)).transpose(0, dimension)
    cos, sin = torch.randn(2, 1, q.shape[2], 128, device="cuda")
    assert missed(rotate(q, q, cos, sin)[1], definition(q, cos, sin)) <= 0.005


def test_answers_past_31_bits():
    q = torch.randn(1, 8, 2**21 + 1, 128, dtype=torch.bfloat16, device="cuda")
    cos, sin = torch.randn(2, 1, q.shape[2], 128, device="cuda")
    found = rotate(q, q[:, :1], cos, sin)[0]
    for part in (slice(5), slice(-5, None)):
        exact = definition(q[:, :, part], cos[:, part], sin[:, part])
        assert missed(found[:, :, part], exact) <= 0.005
