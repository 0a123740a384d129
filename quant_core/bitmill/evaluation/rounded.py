"""A model whose activations or cached keys and values have few bits, for evaluation alone.

Every token's vector x (an input of a quantized linear; a head's key behind its rotation, or value)
is rounded to b bits on a grid of its own and goes on as what that stands for:

    s = (max x - min x) / (2^b - 1)        x' = min x + s round((x - min x) / s)

Nothing of it is stored, and Bitmill's own kernels do not compute so: a row of a report says what a
runtime that does would lose.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bitmill.config.quantization import ROUNDED
from bitmill.errors import ModelError
from bitmill.models.streamed import StreamedModel

_CACHES = ("past_key_values", "layer_past")
"""What blocks call the cache."""
Change = Callable[[StreamedModel, int, nn.Module], None]
"""Changes block i of a model, which is dropped after use."""


def rounded_tokens(x: Tensor, bits: int) -> Tensor:
    """x [..., C], each vector on its own grid of 2^bits values; in the dtype of x."""
    least, most = x.float().aminmax(dim=-1, keepdim=True)
    step = (most - least) / (2**bits - 1)
    steps = ((x.float() - least) / step.clamp(min=1e-30)).round()
    rounded: Tensor = (least + steps * step).to(x.dtype)
    return rounded


def rounding(name: str) -> Change:
    """What a baseline of `ROUNDED` does to blocks."""
    what, bits = ROUNDED[name]
    if what == "activations":
        return lambda model, i, block: _round_inputs(model, i, block, bits)
    return lambda _, i, block: _round_cache(i, block, bits)


def _round_inputs(model: StreamedModel, i: int, block: nn.Module, bits: int) -> None:
    def rounded(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded_tokens(args[0], bits), *args[1:])

    for module in model.linears(block, i).values():
        module.register_forward_pre_hook(rounded)


def _round_cache(i: int, block: nn.Module, bits: int) -> None:
    """Attention hands its keys and values to the cache and goes on with what that gives back."""
    cache, signature = _RoundedCache(bits), inspect.signature(block.forward)
    place = next((name for name in _CACHES if name in signature.parameters), None)

    def given(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache.used = False
        asked = signature.bind_partial(*args, **kwargs)
        if place is not None:
            asked.arguments[place] = cache
        return asked.args, asked.kwargs

    def check(*_: object) -> None:
        if not cache.used:
            raise ModelError(
                f"block {i} does not hand its keys and values to a cache that it is given: leave "
                "the cache out of evaluation.baselines",
                code="no_cache",
                param="evaluation.baselines",
            )

    block.register_forward_pre_hook(given, with_kwargs=True)
    block.register_forward_hook(check)


class _RoundedCache:
    """Of one window, as transformers' attention sees it: keys and values [B, heads, T, C]."""

    def __init__(self, bits: int) -> None:
        self._bits, self.used = bits, False

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, ...]:
        self.used = True
        return rounded_tokens(keys, self._bits), rounded_tokens(values, self._bits)
