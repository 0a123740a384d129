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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitmill.allocation.profile import IndexArray, LinearProfile, SbaRecord, SensitivityProfile
from bitmill.calibration.hooks import run_windows
from bitmill.calibration.statistics import BlockState, Stream, collect
from bitmill.calibration.streams import HiddenStates
from bitmill.models.streamed import StreamedModel
from bitmill.plan.block_memory import backward_bytes
from bitmill.plan.model_plan import Plan
from bitmill.runtime.ranks import SINGLE, Group
from bitmill.sensitivity.embeddings import embedding_profiles
from bitmill.sensitivity.fisher import SensitivitySettings, profile_knapsack
from bitmill.sensitivity.sba import profile_block_sba
from bitmill.solvers.factor import activation_order

BATCH_TOKENS = 8192
"""Tokens that run through a block at once."""

OnUnit = Callable[[int, int, str, str], None]


@dataclass(frozen=True)
class ProfileRequest:
    """What is measured on which data; the digests identify model and calibration."""

    settings: Mapping[str, Any]
    model_digest: str
    calibration_digest: str

    def profile(
        self,
        linears: tuple[LinearProfile, ...],
        orders: Mapping[str, IndexArray],
        sba: Mapping[int, Mapping[str, SbaRecord]],
    ) -> SensitivityProfile:
        """A profile without costs."""
        return SensitivityProfile(
            model_digest=self.model_digest,
            calibration_digest=self.calibration_digest,
            settings=dict(self.settings),
            widths=(),
            linears=linears,
            orders=orders,
            sba=sba,
        )


def make_profile(
    model: StreamedModel,
    tokens: Tensor,
    plan: Plan,
    request: ProfileRequest,
    *,
    folder: Path,
    on_unit: OnUnit,
    group: Group = SINGLE,
) -> SensitivityProfile:
    """Measure what `request.settings["kind"]` names on windows of tokens, int64 [S, T].

    folder: where finished blocks are kept. on_unit: told done, total, the unit and a message.
    group: ranks that make this call together; each gets the whole profile.
    """
    if request.settings["kind"] == "knapsack":
        return _knapsack(model, tokens, plan, request, folder, on_unit, group)
    blocks = _stream(model, tokens, plan, request, folder, on_unit, group)
    base = request.settings.get("base")
    sba = {base: {name: r for b in blocks for name, r in b.sba[base].items()}} if base else {}
    embeddings = tuple(
        LinearProfile(m.name, m.rows, m.columns, np.zeros((m.shape.groups, 0)))
        for m in plan.embeddings
    )
    return request.profile(
        tuple(linear for block in blocks for linear in block.linears) + embeddings,
        {owner: order for block in blocks for owner, order in block.orders.items()},
        sba,
    )


def _knapsack(
    model: StreamedModel,
    tokens: Tensor,
    plan: Plan,
    request: ProfileRequest,
    folder: Path,
    on_unit: OnUnit,
    group: Group,
) -> SensitivityProfile:
    settings = SensitivitySettings(
        widths=tuple(request.settings["widths"]), order=request.settings["order"]
    )
    made = profile_knapsack(
        model,
        tokens,
        plan,
        settings,
        model_digest=request.model_digest,
        calibration_digest=request.calibration_digest,
        folder=folder,
        on_block=lambda done, total: on_unit(done, total, "block", ""),
        group=group,
    )
    embeddings: tuple[LinearProfile, ...] = ()
    if group.first:
        embeddings = embedding_profiles(model, tokens, settings.widths, folder, on_unit)
    embeddings = group.broadcast(embeddings)
    return SensitivityProfile(
        model_digest=made.model_digest,
        calibration_digest=made.calibration_digest,
        settings=dict(request.settings),
        widths=made.widths,
        linears=made.linears + embeddings,
        orders=made.orders,
        sba=made.sba,
    )


@torch.no_grad()
def _stream(
    model: StreamedModel,
    tokens: Tensor,
    plan: Plan,
    request: ProfileRequest,
    folder: Path,
    on_unit: OnUnit,
    group: Group,
) -> list[SensitivityProfile]:
    """One profile per block, in order. A measurement replaces block inputs by the outputs."""
    batch = max(1, BATCH_TOKENS // tokens.shape[1])
    paths = [folder / f"block-{i:05}.npz" for i in range(model.block_count)]
    finished = group.broadcast([path.is_file() for path in paths])
    measure = _measure_sba if request.settings["kind"] == "sba" else _measure_orders
    blocks = []
    turn = backward_bytes(plan, model.dtype.itemsize, batch * tokens.shape[1])
    with HiddenStates(model.device, folder, turn=turn, group=group) as states:
        hidden = states.embed(model, group.shard(tokens), batch)
        for i in range(model.block_count):
            block = model.load_block(i)
            if not finished[i]:
                measured = measure(model, i, block, Stream(hidden, None, group), request, batch)
                if group.first:
                    measured.save(paths[i])
                group.barrier()
            else:
                run_windows(model, i, block, hidden, batch=batch, out=hidden)
            blocks.append(SensitivityProfile.load(paths[i]))
            on_unit(i + 1, plan.block_count, "block", "")
    return blocks


def _measure_sba(
    model: StreamedModel,
    i: int,
    block: nn.Module,
    stream: Stream,
    request: ProfileRequest,
    batch: int,
) -> SensitivityProfile:
    base, order = request.settings["base"], request.settings["order"]
    records, orders = profile_block_sba(model, i, block, stream, base, order=order, batch=batch)
    return _block_profile(model, i, request, orders, {base: records})


def _measure_orders(
    model: StreamedModel,
    i: int,
    block: nn.Module,
    stream: Stream,
    request: ProfileRequest,
    batch: int,
) -> SensitivityProfile:
    groups = model.plan.siblings(i)
    state = BlockState(model, i, block, None, model.linears(block, i))
    seen = collect(state, groups, stream, batch=batch, advance=True)
    seen[groups[0][0]].check()
    orders = {group[0]: activation_order(seen[group[0]].H) for group in groups}
    return _block_profile(model, i, request, orders, {})


def _block_profile(
    model: StreamedModel,
    i: int,
    request: ProfileRequest,
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
    return request.profile(linears, owned, sba)
