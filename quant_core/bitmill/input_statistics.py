"""What refinement knows about a linear's inputs, summed over a stream of block inputs.

    H      = mean x x^T                     x: inputs behind the quantized prefix
    shift  = mean e x^T,  energy = mean |e|^2,  e = y' - y

y' is what the source model's linear puts out for the same token. For a linear that writes to the
residual stream e may be the whole stream's difference, (r' + y') - (r + y). The error of any
replacement ŵ on these tokens follows without running anything:

    mean |y' - x ŵ^T|^2 = energy + 2 <W - ŵ, shift> + tr((W - ŵ) H (W - ŵ)^T)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitmill.blocks import StreamedModel
from bitmill.codes import output_error
from bitmill.distributed import SINGLE, Group
from bitmill.hessian import HessianAccumulator
from bitmill.observe import Seen, observe

RESIDUAL_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Stream:
    """Block inputs [S, T, D] of the same tokens: behind the quantized prefix and, where the
    asymmetric correction is wanted, in the source model.

    group: ranks of which each holds windows of its own; statistics are those of all windows."""

    hidden: Tensor
    source: Tensor | None = None
    group: Group = SINGLE


@dataclass(frozen=True, eq=False)
class BlockState:
    """A block being refined, its untouched copy (or None) and its linears by full name.

    writers: linears that add to the residual stream, in execution order; () leaves e = y' - y.
    """

    model: StreamedModel
    index: int
    current: nn.Module
    source: nn.Module | None
    linears: Mapping[str, nn.Module]
    writers: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """H f32 [K, K]; shift f32 [N, K] and energy where the source was run too; tokens seen."""

    H: Tensor
    tokens: int
    shift: Tensor | None = None
    energy: float = 0.0

    def error(self, residual: Tensor) -> float:
        """mean |y' - x ŵ^T|^2 for residual = W - ŵ, f32 [N, K]."""
        own = output_error(residual, self.H)
        if self.shift is None:
            return own
        return self.energy + 2 * float((residual * self.shift).sum(dtype=torch.float64)) + own


class _Shift:
    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._sum = torch.zeros(rows, columns, device=device)
        self._energy = torch.zeros((), dtype=torch.float64, device=device)
        self._mass = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, e: Tensor, x: Tensor, weight: Tensor | None) -> None:
        e, x = e.float(), x.float()
        weighted = e if weight is None else e * weight[:, None]
        self._sum.addmm_(weighted.T, x)
        self._energy += (weighted * e).sum(dtype=torch.float64)
        self._mass += len(x) if weight is None else weight.double().sum()

    def all_reduce(self, group: Group) -> None:
        group.all_reduce(self._sum, self._energy, self._mass)

    def mean(self) -> tuple[Tensor, float]:
        mass = self._mass.clamp(min=torch.finfo(torch.float32).tiny)
        return self._sum / mass.float(), float(self._energy / mass)


def collect(
    state: BlockState,
    groups: Sequence[Sequence[str]],
    stream: Stream,
    *,
    batch: int,
    token_weights: Mapping[str, Tensor] | None = None,
) -> dict[str, InputStatistics]:
    """Statistics of every linear in `groups` (lists of names that read the same input).

    Linears of a group share one H tensor unless they have token weights f32 [S, T] of their own.
    Routed experts have no shift: the two streams send them different tokens.
    """
    shifts = state.source is not None and stream.source is not None
    collector = _Collector(state, groups, token_weights or {}, shifts)
    for start in range(0, stream.hidden.shape[0], batch):
        collector.add(stream, slice(start, start + batch))
    return collector.finish(stream.group)


class _Collector:
    def __init__(
        self,
        state: BlockState,
        groups: Sequence[Sequence[str]],
        token_weights: Mapping[str, Tensor],
        shifts: bool,
    ) -> None:
        self.state, self.groups, self.token_weights = state, groups, token_weights
        self.hessians: dict[str, HessianAccumulator] = {}
        self.shifts: dict[str, _Shift] = {}
        self.owner: dict[str, str] = {}
        for group in groups:
            plain = [name for name in group if name not in token_weights]
            for name in group:
                self.owner[name] = name if name in token_weights else plain[0]
                weight = state.linears[name].weight
                assert isinstance(weight, Tensor)
                owner = self.owner[name]
                if owner not in self.hessians:
                    columns = state.model.plan.by_name[name].columns
                    self.hessians[owner] = HessianAccumulator(
                        columns, weight.device, name=f"the input of {name}"
                    )
                if shifts and not state.model.plan.by_name[name].routed:
                    shape = state.model.plan.by_name[name].shape
                    self.shifts[name] = _Shift(shape.rows, shape.columns, weight.device)

    def add(self, stream: Stream, part: slice) -> None:
        device = self.state.model.device
        hidden = stream.hidden[part].to(device)
        now = self._observe(self.state.current, hidden)
        was: dict[str, Seen] = {}
        drift = None
        if self.state.source is not None and stream.source is not None:
            source = stream.source[part].to(device)
            was = self._observe(self.state.source, source)
            drift = (source - hidden).reshape(-1, hidden.shape[-1])
        for group in self.groups:
            if group[0] in now:
                self._add_group(group, now, was, drift, part)

    def _observe(self, block: nn.Module, hidden: Tensor) -> dict[str, Seen]:
        """Inputs and outputs; without a source stream, of the first linear of each group only."""
        state = self.state
        if state.source is None:
            names = {owner for owner in self.owner.values()}
        else:
            names = set(self.owner)
            if names & set(state.writers):
                last = max(state.writers.index(w) for w in names & set(state.writers))
                names |= set(state.writers[: last + 1])
        prefix = f"{state.model.plan.block_prefix}.{state.index}."
        modules = {name: block.get_submodule(name.removeprefix(prefix)) for name in names}
        return observe(state.model, state.index, block, modules, hidden)

    def _add_group(
        self,
        group: Sequence[str],
        now: Mapping[str, Seen],
        was: Mapping[str, Seen],
        drift: Tensor | None,
        part: slice,
    ) -> None:
        for owner in dict.fromkeys(self.owner[name] for name in group):
            self.hessians[owner].add(now[owner].x, self._weight(owner, part))
        if drift is None:
            return
        for name in group:
            if name in self.shifts:
                self._add_shift(name, now, was, drift, part)

    def _add_shift(
        self,
        name: str,
        now: Mapping[str, Seen],
        was: Mapping[str, Seen],
        drift: Tensor,
        part: slice,
    ) -> None:
        writers = self.state.writers
        if name in writers:
            before = writers[: writers.index(name) + 1]
            e = drift + sum(was[w].y - now[w].y for w in before)
        else:
            e = was[name].y - now[name].y
        self.shifts[name].add(e, now[name].x, self._weight(name, part))

    def _weight(self, name: str, part: slice) -> Tensor | None:
        if name not in self.token_weights:
            return None
        weight = self.token_weights[name][part].reshape(-1)
        return weight.to(self.state.model.device, torch.float32)

    def finish(self, ranks: Group) -> dict[str, InputStatistics]:
        for hessian in self.hessians.values():
            hessian.all_reduce(ranks)
        for sums in self.shifts.values():
            sums.all_reduce(ranks)
        means = {owner: (h.mean(), h.tokens) for owner, h in self.hessians.items()}
        result = {}
        for name, owner in self.owner.items():
            H, tokens = means[owner]
            shift, energy = self.shifts[name].mean() if name in self.shifts else (None, 0.0)
            result[name] = InputStatistics(H, tokens, shift, energy)
        return result


@torch.no_grad()
def residual_writers(
    model: StreamedModel, index: int, block: nn.Module, hidden: Tensor
) -> tuple[str, ...]:
    """Linears of the block that add their output to the residual stream, in execution order.

    Candidates are linears alone in their stage with D output rows. They are accepted together if
    block output = block input + the sum of their outputs on hidden [B, T, D], else there are none
    (a norm after the linear, or experts).
    """
    linears = model.linears(block, index)
    stages = [stage for stage in model.plan.input_stages(index) if len(stage) == 1]
    alone = [group[0] for stage in stages for group in stage if len(group) == 1]
    rows = {linear.name: linear.rows for linear in model.plan.block_linears(index)}
    names = tuple(name for name in alone if rows[name] == hidden.shape[-1])
    if not names:
        return ()
    hidden = hidden.to(model.device, model.dtype)
    seen = observe(model, index, block, {name: linears[name] for name in names}, hidden)
    output = model.run_block(index, block, hidden)
    total = hidden + sum(seen[name].y for name in names).view_as(hidden)  # type: ignore[union-attr]
    missing = (output - total).float().norm() / output.float().norm()
    return names if float(missing) < RESIDUAL_TOLERANCE else ()
