"""The `profile` stage: which measurement a job needs, and the passes that need no gradient.

| kind       | measured                                              | by               |
|------------|-------------------------------------------------------|------------------|
| `knapsack` | cost of every width for every group, column orders    | `fisher.py` |
| `sba`      | salience order, output KL of every p, column orders   | `sba.py`         |
| `orders`   | column orders alone                                   | second moments   |

Embeddings and heads that are quantized too have their costs measured by `refinement/embeddings.py`.

`sba` and `orders` stream the source model once, forward. Each finished block is kept as a profile
of its own linears, so a killed run goes on behind it.

Of several ranks each carries its own windows, and all hold the same sums; the first one writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from bitmill.allocation.profile import (
    LinearProfile,
    ProfileConfig,
    ProfileOrigin,
    SbaRecord,
    SensitivityProfile,
)
from bitmill.calibration.hooks import run_windows
from bitmill.calibration.kept_weights import KeptWeights
from bitmill.calibration.statistics import BlockState, Stream, collect
from bitmill.calibration.streams import HiddenStates
from bitmill.config.bit_width_map import WIDTHS
from bitmill.errors import SpecError
from bitmill.models.streamed import StreamedModel
from bitmill.plan.block_memory import backward_bytes
from bitmill.plan.model_plan import Plan
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.sensitivity.checkpoint import ProfileCheckpoint
from bitmill.sensitivity.embeddings import embedding_profiles
from bitmill.sensitivity.fisher import SensitivitySettings, profile_knapsack
from bitmill.sensitivity.sba import profile_block_sba
from bitmill.solvers.factor import activation_order

BATCH_TOKENS = 8192
"""Tokens that run through a block at once."""

OnUnit = Callable[[int, int, str, str], None]


def make_profile(
    model: StreamedModel,
    tokens: Tensor,
    plan: Plan,
    origin: ProfileOrigin,
    *,
    folder: Path,
    on_unit: OnUnit,
    group: Ranks = SINGLE,
    weights: KeptWeights | None = None,
) -> SensitivityProfile:
    """Measure what `origin.config.kind` names on windows of tokens, int64 [S, T].

    folder: where finished blocks are kept. on_unit: told done, total, the unit and a message.
    group: ranks that make this call together; each gets the whole profile. weights: where a
    backward pass leaves those of the tokens.
    """
    if origin.config.kind == "knapsack":
        return _knapsack(model, tokens, plan, origin, folder, on_unit, group, weights)
    blocks = _stream(model, tokens, plan, origin, folder, on_unit, group)
    base = origin.config.base
    sba = {base: {name: r for b in blocks for name, r in b.sba[base].items()}} if base else {}
    embeddings = tuple(
        LinearProfile(m.name, m.rows, m.columns, np.zeros((m.shape.groups, 0)))
        for m in plan.embeddings
    )
    return SensitivityProfile(
        origin=origin,
        widths=(),
        linears=tuple(linear for block in blocks for linear in block.linears) + embeddings,
        orders={owner: order for block in blocks for owner, order in block.orders.items()},
        sba=sba,
    )


def _knapsack(
    model: StreamedModel,
    tokens: Tensor,
    plan: Plan,
    origin: ProfileOrigin,
    folder: Path,
    on_unit: OnUnit,
    group: Ranks,
    weights: KeptWeights | None,
) -> SensitivityProfile:
    settings = SensitivitySettings(
        widths=origin.config.widths or WIDTHS,
        order=_order(origin.config),
        code=origin.config.code or "affine",
        outliers=origin.config.outliers or (),
    )
    made = profile_knapsack(
        model,
        tokens,
        plan,
        settings,
        origin=origin,
        folder=folder,
        on_block=lambda done, total: on_unit(done, total, "block", ""),
        group=group,
        weights=weights,
    )
    embeddings: tuple[LinearProfile, ...] = ()
    if group.first:
        embeddings = embedding_profiles(model, tokens, settings.widths, folder, on_unit)
    return replace(made, linears=made.linears + group.broadcast(embeddings))


@torch.no_grad()
def _stream(
    model: StreamedModel,
    tokens: Tensor,
    plan: Plan,
    origin: ProfileOrigin,
    folder: Path,
    on_unit: OnUnit,
    group: Ranks,
) -> list[SensitivityProfile]:
    """One profile per block, in order. A measurement replaces block inputs by the outputs."""
    batch = max(1, BATCH_TOKENS // tokens.shape[1])
    saved = ProfileCheckpoint(folder, group)
    measure = _measure_sba if origin.config.kind == "sba" else _measure_orders
    blocks = []
    turn = backward_bytes(plan, model.dtype.itemsize, batch * tokens.shape[1])
    with HiddenStates(model.device, folder, turn=turn, group=group) as states:
        hidden = states.embed(model, group.shard(tokens), batch)
        for i in range(model.block_count):
            block = model.load_block(i)
            measured = saved.load(i)
            if measured is None:
                measured = measure(model, i, block, Stream(hidden, None, group), origin, batch)
                saved.save(i, measured)
            else:
                run_windows(model, i, block, hidden, batch=batch, out=hidden)
            blocks.append(measured)
            on_unit(i + 1, plan.block_count, "block", "")
    return blocks


def _measure_sba(
    model: StreamedModel,
    i: int,
    block: nn.Module,
    stream: Stream,
    origin: ProfileOrigin,
    batch: int,
) -> SensitivityProfile:
    base, order = origin.config.base, _order(origin.config)
    if base is None:
        raise SpecError("a profile of kind 'sba' needs a base width", param="allocation.method")
    code = origin.config.code or "affine"
    records, orders = profile_block_sba(
        model, i, block, stream, base, order=order, batch=batch, code=code
    )
    return _block_profile(model, i, origin, orders, {base: records})


def _measure_orders(
    model: StreamedModel,
    i: int,
    block: nn.Module,
    stream: Stream,
    origin: ProfileOrigin,
    batch: int,
) -> SensitivityProfile:
    groups = model.plan.siblings(i)
    state = BlockState(model, i, block, None, model.linears(block, i))
    seen = collect(state, groups, stream, batch=batch, advance=True)
    for first, *_ in groups[:1]:
        seen[first].check()
    orders = {group[0]: activation_order(seen[group[0]].H.diagonal()) for group in groups}
    return _block_profile(model, i, origin, orders, {})


def _block_profile(
    model: StreamedModel,
    i: int,
    origin: ProfileOrigin,
    orders: Mapping[str, Tensor],
    sba: Mapping[int, Mapping[str, SbaRecord]],
) -> SensitivityProfile:
    """The profile of one block's linears; the first of siblings owns their order."""
    owner = {name: group[0] for group in model.plan.siblings(i) for name in group}
    linears = tuple(
        LinearProfile(
            linear.name,
            linear.rows,
            linear.columns,
            np.zeros((linear.shape.groups, 0)),
            owner[linear.name] if orders else None,
        )
        for linear in model.plan.block_linears(i)
    )
    owned = {name: orders[name].cpu().numpy().astype(np.int32) for name in owner.values() if orders}
    return SensitivityProfile(origin=origin, widths=(), linears=linears, orders=owned, sba=sba)


def _order(config: ProfileConfig) -> Literal["natural", "activation"]:
    return config.order or "activation"
