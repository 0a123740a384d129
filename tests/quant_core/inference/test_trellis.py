"""The module of trellis codes takes and refuses the same shapes as a plain linear."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bitmill
from bitmill.inference.engine_layers import Product
from bitmill.inference.linear import QuantizedLinear, join_siblings
from bitmill.inference.trellis import TrellisLinear
from tiny import tiny_llama
from trellis_models import pack_trellis


def module_of(N: int, K: int, rates: tuple[int, ...], order: str | None = None) -> TrellisLinear:
    module = TrellisLinear(K, N, rates, order=order)
    draw = torch.Generator().manual_seed(N)
    for key, buffer in module.named_buffers():
        if key == "order":
            buffer.copy_(torch.randperm(K, generator=draw))
            continue
        codes = key.startswith("codes")
        buffer.copy_(
            torch.randint(256, buffer.shape, generator=draw, dtype=torch.uint8)
            if codes
            else torch.rand(buffer.shape, generator=draw)
        )
    return module


@pytest.mark.parametrize("columns", [1, 296, 304], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 9], ids=str)
def test_inputs_of_another_width_are_refused(columns: int, tokens: int) -> None:
    module = module_of(48, 300, (3, 4, 2))
    with pytest.raises(ValueError, match=f"x has {columns} columns: the weight has 300"):
        module(torch.ones(tokens, columns))


@pytest.mark.parametrize("shape", [(300,), (0, 300), (2, 0, 300), (2, 5, 300)], ids=str)
def test_outputs_have_the_shape_of_their_inputs(shape: tuple[int, ...]) -> None:
    module = module_of(48, 300, (3, 4, 2))
    x = torch.ones(shape, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 48)
    assert x.grad is not None
    assert x.grad.shape == shape
    torch.testing.assert_close(y, x @ module.dequantize().t(), atol=1e-4, rtol=1e-4)


def three_modules() -> list[TrellisLinear]:
    """Linears of one input, of which the first owns the column order."""
    query = module_of(48, 300, (3, 4, 2), "own")
    others = [module_of(N, 300, rates, "shared") for N, rates in ((16, (5, 1, 3)), (9, (2, 2, 8)))]
    for module in others:
        assert query.order is not None
        module.share_order(query.order)
    return [query, *others]


def joined(modules: list[TrellisLinear]) -> list[TrellisLinear]:
    names = (f"layers.0.self_attn.{letter}_proj" for letter in "qkv")
    join_siblings(zip(names, modules, strict=True))
    return modules


@pytest.mark.parametrize("tokens", [1, 8, 9], ids=str)
def test_siblings_are_multiplied_together_bit_for_bit_as_alone(tokens: int) -> None:
    modules, alone = joined(three_modules()), three_modules()
    x = torch.randn(tokens, 300, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    found = [module(x) for module in modules]
    wanted = [module(again) for module in alone]
    for y, expected in zip(found, wanted, strict=True):
        assert torch.equal(y, expected)
    assert all(module._runtime is None for module in modules)
    torch.cat(found, 1).square().sum().backward()
    torch.cat(wanted, 1).square().sum().backward()
    assert x.grad is not None
    assert again.grad is not None
    torch.testing.assert_close(x.grad, again.grad, atol=1e-3, rtol=1e-4)


def test_a_sibling_that_is_called_alone_or_twice_gives_what_it_gives_alone() -> None:
    query, key, value = joined(three_modules())
    alone = three_modules()
    one, other = torch.randn(2, 3, 300)
    for module, plain, x in (
        *((query, alone[0], one), (query, alone[0], one), (key, alone[1], other)),
        *((value, alone[2], one), (query, alone[0], other), (value, alone[2], other)),
    ):
        assert torch.equal(module(x), plain(x))
    query.to(torch.bfloat16)
    assert torch.equal(key(one), alone[1](one))


def test_an_engine_multiplies_the_linears_of_a_layer_together() -> None:
    modules = three_modules()
    product = Product([module.stored() for module in modules], torch.device("cpu"))
    x, bias = torch.randn(2, 5, 300), torch.randn(73)
    expected = torch.cat([module(x) for module in modules], -1)
    assert torch.equal(product(x, None), expected)
    assert torch.equal(product(x, bias), expected + bias)


def test_a_model_multiplies_siblings_together_bit_for_bit_as_alone(tmp_path: Path) -> None:
    model = bitmill.load(pack_trellis(tiny_llama(tmp_path / "model"), tmp_path / "packed"))
    tokens = torch.arange(1, 13)[None]
    found = model(tokens).logits
    groups = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            if "_proj" in name and not name.endswith(("o_proj", "down_proj")):
                assert module.siblings is not None
                groups.add(module.siblings)
            module.siblings = None
    assert len(groups) == 2 * model.config.num_hidden_layers
    assert torch.equal(model(tokens).logits, found)
