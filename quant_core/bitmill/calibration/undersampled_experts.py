"""What stands in for the tokens that a routed expert did not see.

Of K input columns and n calibration tokens, an expert's linear with n < K is starved: its second
moments cannot have full rank. They are filled up to K tokens,

    H = (n H_own + (K - n) H_layer) / K

with the mean over the layer's experts, weighted by their tokens. gate_proj and up_proj of all
experts read the layer's own input, so H_layer is that input's. down_proj reads neurons that are
the expert's own, so only their size carries over: H_layer = (mean of diag H) I, which is plain
rounding with clip search where the expert saw nothing. A layer that no token reached has H = I.

The loss gradients behind a row weight q_n (`sensitivity/fisher.py`, `loss_weights.py`) are filled
up alike, or the rows that one token happens to need would take the bits of the others. How often
the expert is chosen is known: q_n of a profile is per token of the whole text, and an expert
without tokens counts as if one had reached it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from bitmill.calibration.hessian import HessianAccumulator

_OWN_INPUTS = "down_proj"


class Seen(Protocol):
    """What reached a linear: how many tokens, of how many values each."""

    @property
    def tokens(self) -> int: ...

    @property
    def columns(self) -> int: ...


def expert_part(name: str) -> tuple[str, str] | None:
    """The layer and the part of an expert's linear, alike for all experts; None for others."""
    layer, experts, rest = name.rpartition(".experts.")
    return (layer, rest.partition(".")[2]) if experts else None


def is_starved(name: str, tokens: int, columns: int) -> bool:
    """Whether what a linear saw is filled up."""
    return expert_part(name) is not None and tokens < columns


def starved_note(name: str, columns: int) -> str:
    """What a report says of a starved linear."""
    with_what = "the layer's mean input"
    if name.endswith(_OWN_INPUTS):
        with_what = "plain rounding"
    return f"starved expert: fewer tokens than its {columns} columns, filled up with {with_what}"


def filled_means(inputs: Mapping[str, HessianAccumulator]) -> dict[str, Tensor]:
    """H f32 [K, K], or its diagonal, of the starved among some inputs, by what names each."""
    filled = {}
    for names in _layers(inputs):
        starved = [
            name for name in names if is_starved(name, inputs[name].tokens, inputs[name].columns)
        ]
        if not starved:
            continue
        layer = _layer_mean([inputs[name] for name in names])
        if names[0].endswith(_OWN_INPUTS):
            layer = _even(layer)
        for name in starved:
            share = inputs[name].tokens / len(layer)
            filled[name] = share * inputs[name].mean() + (1 - share) * layer
    return filled


def _layer_mean(inputs: Sequence[HessianAccumulator]) -> Tensor:
    tokens = sum(one.tokens for one in inputs)
    layer = torch.zeros_like(inputs[0].mean())
    for one in inputs:
        if one.tokens:
            layer += one.tokens / tokens * one.mean()
    return layer if tokens else _even(torch.ones_like(layer))


def _even(H: Tensor) -> Tensor:
    """(mean of diag H) I, or its diagonal where H is one."""
    if H.ndim == 1:
        return H.mean().expand_as(H)
    return torch.eye(len(H), device=H.device) * H.diagonal().mean()


def fill_squares(squares: Mapping[str, Tensor], inputs: Mapping[str, Seen]) -> dict[str, Tensor]:
    """Squared gradients summed over tokens, f64 [N] per linear; those of starved experts filled."""
    filled = dict(squares)
    for names in _layers(squares):
        routed = sum(inputs[name].tokens for name in names)
        mean = sum(float(squares[name].mean()) for name in names) / max(routed, 1)
        for name in names:
            n, full = inputs[name].tokens, inputs[name].columns
            if is_starved(name, n, full):
                filled[name] = (squares[name] + (full - n) * mean) / full * max(n, 1)
    return filled


def _layers(names: Mapping[str, object]) -> Iterator[Sequence[str]]:
    """The same part of all experts of a layer."""
    layers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        if (part := expert_part(name)) is not None:
            layers.setdefault(part, []).append(name)
    yield from layers.values()
