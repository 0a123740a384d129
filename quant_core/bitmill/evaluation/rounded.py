"""A model whose activations or cached keys and values have few bits, for evaluation alone.

Every token's vector (an input of a quantized linear; a head's key behind its rotation, or value) is
rounded on a min-max grid of its own (`activations/grids.py`), or as a rule of activations says, and
goes on as what that stands for.

Nothing of it is stored, and Bitmill's own kernels do not compute so: a row of a report says what a
runtime that does would lose.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.config.rounded import ACTIVATION_RULES, Rounded
from bitmill.errors import ModelError
from bitmill.evaluation.activations.grids import fp8_tokens, rounded_tokens
from bitmill.evaluation.activations.rule import ActivationRule, LinearInputs
from bitmill.models.streamed import StreamedModel

_CACHES = ("past_key_values", "layer_past")
"""What blocks call the cache."""
Change = Callable[[StreamedModel, int, nn.Module], None]
"""Changes block i of a model, which is dropped after use."""
Ranges = Mapping[str, tuple[Tensor, Tensor]]
"""Linear -> least and largest value of its inputs, f32 []."""
NO_COLUMNS = torch.empty(0, dtype=torch.int64)


def rounding(
    asked: Rounded,
    *,
    outliers: Callable[[str], Tensor] = lambda _: NO_COLUMNS,
    ranges: Ranges = MappingProxyType({}),
) -> Change:
    """What is done to blocks.

    outliers: input columns i64 [k] of a linear whose weights are stored in 16 bits; asked where
    there is a rule. ranges: for a rule that observes them.
    """
    if asked.what == "cache":
        return lambda _, i, block: _round_cache(i, block, asked.bits)
    if asked.rule is None:
        plain = fp8_tokens if asked.fp8 else lambda x: rounded_tokens(x, asked.bits)
        return _of_inputs(lambda _: plain)
    rule = rule_of(asked.rule)

    def of_linear(name: str) -> Callable[[Tensor], Tensor]:
        inputs = LinearInputs(outliers(name), *ranges.get(name, ()))
        return lambda x: rule.rounded(x, asked.bits, inputs)

    return _of_inputs(of_linear)


def rule_of(name: str) -> ActivationRule:
    """The rule of this name."""
    rule: ActivationRule = ACTIVATION_RULES[name]()
    return rule


def observing(ranges: dict[str, tuple[Tensor, Tensor]]) -> Change:
    """Changes nothing, and fills `ranges` with what linears read while blocks run."""

    def of_linear(name: str) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            least, most = x.float().aminmax()
            if name in ranges:
                least, most = (
                    torch.minimum(least, ranges[name][0]),
                    torch.maximum(most, ranges[name][1]),
                )
            ranges[name] = least, most
            return x

        return look

    return _of_inputs(of_linear)


def _of_inputs(of_linear: Callable[[str], Callable[[Tensor], Tensor]]) -> Change:
    """of_linear: full name -> what its inputs [..., T, K] become."""

    def change(model: StreamedModel, i: int, block: nn.Module) -> None:
        for name, module in model.linears(block, i).items():
            become = of_linear(name)

            def changed(
                _: nn.Module,
                args: tuple[Any, ...],
                become: Callable[[Tensor], Tensor] = become,
            ) -> tuple[Any, ...]:
                return (become(args[0]), *args[1:])

            module.register_forward_pre_hook(changed)

    return change


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
