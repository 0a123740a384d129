"""The packed module computes what its dequantized weight computes, and keeps its buffers intact."""

from __future__ import annotations

import copy

import pytest
import torch

from bitmill.errors import FormatError, InputError
from bitmill.inference.linear import QuantizedLinear, join_siblings
from weights import random_weight


def module_of(N: int, K: int, widths: tuple[int, ...], **options: bool) -> QuantizedLinear:
    weight = random_weight(N, K, widths, **options)
    return QuantizedLinear.from_packed(weight.pack())


@pytest.mark.parametrize("ordered", [False, True], ids=["natural", "ordered"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
def test_forward_equals_the_dequantized_forward(
    dtype: torch.dtype, limit: float, ordered: bool
) -> None:
    weight = random_weight(24, 300, (3, 1, 5), ordered=ordered)
    bias = torch.linspace(-1, 1, 24)
    module = QuantizedLinear.from_packed(weight.pack(), bias=bias)
    x = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = module(x)
    expected = x.double() @ weight.dequantize().double().t() + bias.double()
    assert y.dtype == dtype
    assert y.shape == (2, 3, 24)
    assert (y.double() - expected).norm() / expected.norm() < limit


def test_state_dict_has_the_names_of_the_format() -> None:
    weight = random_weight(8, 296, (3, 4, 2), ordered=True)
    packed = weight.pack()
    module = QuantizedLinear.from_packed(packed, bias=torch.zeros(8))
    stored = packed.tensors("x") | packed.rewrites.tensors("x")
    expected = {name.removeprefix("x.") for name in stored} | {"bias"}
    assert module.state_dict().keys() == expected


def test_an_order_of_another_linear_is_used_but_not_stored() -> None:
    weight = random_weight(8, 256, (3, 4), ordered=True)
    assert weight.order is not None
    module = QuantizedLinear(256, 8, (3, 4), order="shared")
    module.fill(weight.pack().tensors(""))
    module.share_order(weight.order)
    assert "order" not in module.state_dict()
    assert torch.equal(module.dequantize(), weight.dequantize())


def test_casting_a_model_leaves_scales_and_codes_as_stored() -> None:
    module = module_of(8, 128, (4,), ordered=True)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.ones(1, 128)
    expected = module(x)
    torch.nn.Sequential(module).to(torch.bfloat16).to(torch.float64)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert torch.equal(module(x), expected)


def test_a_move_drops_what_was_built_for_the_old_place() -> None:
    module = module_of(8, 128, (4,))
    module(torch.ones(1, 128))
    assert module._runtime
    module.to(torch.bfloat16)
    assert not module._runtime


def test_the_weight_is_a_dequantized_copy_that_cannot_be_written() -> None:
    module = module_of(8, 128, (4,))
    with pytest.raises(InputError, match="cannot be written to"):
        module.weight.zero_()
    module.weight.clone().zero_()
    assert torch.equal(module.weight, module.dequantize())
    assert bool(module.weight.any())


def test_new_tensors_replace_the_cached_weight() -> None:
    module = module_of(8, 128, (4,))
    x = torch.ones(1, 128)
    old = module(x)
    module.fill(random_weight(8, 128, (4,), seed=9).pack().tensors(""))
    assert not torch.equal(module(x), old)


def test_a_copy_is_independent() -> None:
    module = module_of(8, 128, (4,))
    x = torch.ones(1, 128)
    expected = module(x)
    twin = copy.deepcopy(module)
    module.scales.zero_()
    assert torch.equal(twin(x), expected)


def test_illegal_buffers_stop_the_first_forward() -> None:
    module = module_of(8, 128, (4,))
    module.scales[0, 3] = float("nan")
    with pytest.raises(FormatError, match=r"scales holds nan for group 0, row 3"):
        module(torch.ones(1, 128))


def test_siblings_multiply_once_and_give_each_its_part() -> None:
    first, second = module_of(8, 256, (4, 2)), module_of(24, 256, (3, 3))
    join_siblings([("layers.0.self_attn.q_proj", first), ("layers.0.self_attn.k_proj", second)])
    group = first.siblings
    assert group is not None
    assert second.siblings is group
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    y = group.output(first, x)
    stack = group._stack
    other = torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(y, first(x), atol=1e-5)
    assert torch.allclose(group.output(second, x), second(x), atol=1e-5)
    assert group._kept is None
    assert torch.allclose(group.output(second, other), second(other), atol=1e-5)
    assert torch.allclose(group.output(second, other), second(other), atol=1e-5)
    assert group._stack is stack
    first.to(torch.bfloat16)
    assert group._stack is None


def test_only_linears_of_one_input_become_siblings() -> None:
    q, k, o = (module_of(8, 128, (4,)) for _ in range(3))
    ordered = module_of(8, 128, (4,), ordered=True)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "self_attn.v_proj")
    join_siblings((f"layers.0.{n}", m) for n, m in zip(names, (q, k, o, ordered), strict=True))
    assert q.siblings is k.siblings is not None
    assert o.siblings is None
    assert ordered.siblings is None
