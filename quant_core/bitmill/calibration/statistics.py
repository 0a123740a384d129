"""What refinement knows about a linear's inputs, summed over a stream of block inputs.

    H      = mean x x^T                     x: inputs behind the quantized prefix
    shift  = mean e x^T,  energy = mean e^2, per row,  e = y' - y

y' is what the source model's linear puts out for the same token, from its input x'. Both are W
times their inputs, so with d = x' - x neither is run: shift = W mean d x^T and energy = diag(W
(mean d d^T) W^T), from sums that linears with one input share. For a linear that writes to the
residual stream e may be the whole stream's difference, (r' + y') - (r + y), which is summed as it
is; where only the shift is wanted y is left out of the sum, since mean y x^T = W H. The error of
any replacement ŵ on these tokens follows without running anything:

    mean |y' - x ŵ^T|^2 = sum energy + 2 <W - ŵ, shift> + tr((W - ŵ) H (W - ŵ)^T)

Rows of W are independent in all of it, so shifts and energies of some rows are had alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from bitmill.calibration.hessian import HessianAccumulator, all_reduce
from bitmill.calibration.hooks import Ends, batches, observe, observe_ends
from bitmill.calibration.replay import Replay
from bitmill.calibration.undersampled_experts import filled_means
from bitmill.models.streamed import StreamedModel, weight_of
from bitmill.quant.codes import row_errors
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.runtime.timer import timed
from bitmill.solvers.factor import mirrored
from bitmill_kernels.linalg.hessian import cross_update, hessian_update
from bitmill_kernels.linalg.split_product import split_product

RESIDUAL_TOLERANCE = 1e-3
RESIDUAL_ROUNDINGS = 2.0
"""Share of a block's output that may be missing from input and linears: the least, and in units of
the model's precision, in which the block's own sums are rounded."""

COEFFICIENT_TOLERANCE = 0.05
"""How far from 1 the least-squares factor may be by which a linear's output adds to the stream."""

Energy = Literal["squares", "trace"]

Rows = slice | Tensor
"""Some rows of a matrix: a range, or indices i64 [M]."""


@dataclass(frozen=True, eq=False)
class Stream:
    """Block inputs [S, T, D] of the same tokens: behind the quantized prefix and, where the
    asymmetric correction is wanted, in the source model.

    group: ranks of which each holds windows of its own; statistics are those of all windows.
    weights: of the tokens f32 [S, T], by the first of linears that read one input; where there are
    none, every token counts alike."""

    hidden: Tensor
    source: Tensor | None = None
    group: Ranks = SINGLE
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class BlockState:
    """A block being refined, its untouched copy (or None) and its linears by full name.

    writers: linears that add to the residual stream, in execution order; () leaves e = y' - y.
    replay: what runs of both blocks keep for later ones.
    """

    model: StreamedModel
    index: int
    current: nn.Module
    source: nn.Module | None
    linears: Mapping[str, nn.Module]
    writers: tuple[str, ...] = ()
    replay: Replay = field(default_factory=Replay)


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """H f32 [K, K]; tokens seen; where the source was run too, for the M rows asked for, shift f32
    [M, K] and, where that was asked for, energy f64 [M].

    check: raises CalibrationError where inputs were not finite; all linears of a step share it.
    """

    H: Tensor
    tokens: int
    check: Callable[[], None]
    shift: Tensor | None = None
    energy: Tensor | None = None

    def error(self, residual: Tensor) -> Tensor:
        """mean |y' - x ŵ^T|^2 of the rows asked for, f64 [] on the device.

        residual: W - ŵ, f32 [M, K]. Raises ValueError where there is a shift but no energy.
        """
        own = row_errors(residual, self.H)
        if self.shift is None:
            return own.sum()
        if self.energy is None:
            raise ValueError("errors were not asked for: collect with judge=True")
        crossed = (residual * self.shift).sum(1, dtype=torch.float64)
        return (self.energy + 2 * crossed + own).sum()


class _Sums:
    """Means of a b^T over tokens, f32 [M, K] on one device; of a^2 or (W a)^2.

    energy: what of a is summed for it, a a^T ("squares"), a^2 ("trace") or nothing.
    """

    def __init__(
        self, rows: int, columns: int, device: torch.device, energy: Energy | None
    ) -> None:
        shape = {None: (), "trace": (rows,), "squares": (rows, rows)}[energy]
        dtype = torch.float32 if energy == "squares" else torch.float64
        self._kind = energy
        self._cross = torch.zeros(rows, columns, device=device)
        self._energy = torch.zeros(shape, dtype=dtype, device=device)
        self._mass = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, a: Tensor, b: Tensor, weight: Tensor | None = None) -> None:
        """a [T, M] in fp32 or the dtype of b [T, K], which the product takes; weight f32 [T].

        a is f32 where its trace is summed.
        """
        with timed("hessian"):
            if weight is not None:
                root = weight.sqrt()[:, None]
                a, b = a * root.to(a.dtype), b * root.to(b.dtype)
            cross_update(self._cross, a.to(b.dtype), b)
            if self._kind == "squares":
                hessian_update(self._energy, a.to(b.dtype))
            elif self._kind == "trace":
                self._energy += torch.linalg.vector_norm(a, dim=0).double().square()
            self._mass += len(b) if weight is None else weight.double().sum()

    def all_reduce(self, group: Ranks) -> None:
        group.all_reduce(self._cross, self._energy, self._mass)

    def mean(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """mean a b^T and mean a^2, f64, of some of the M rows."""
        mass = self._mass.clamp(min=torch.finfo(torch.float32).tiny)
        energy = self._energy[rows] / mass if self._kind else None
        return self._cross[rows] / mass.float(), energy

    def through(self, W: Tensor) -> tuple[Tensor, Tensor | None]:
        """mean (W a) b^T f32 [N, K] and mean (W a)^2 f64 [N] for W f32 [N, M]."""
        mass = self._mass.clamp(min=torch.finfo(torch.float32).tiny).float()
        energy = row_errors(W, mirrored(self._energy / mass)) if self._kind else None
        return split_product(W, self._cross / mass), energy


def collect(
    state: BlockState,
    groups: Sequence[Sequence[str]],
    stream: Stream,
    *,
    batch: int,
    advance: bool = False,
    advance_source: bool = False,
    judge: bool = True,
    rows: Callable[[int], Rows] = lambda count: slice(count),
    on_batch: Callable[[slice, Mapping[str, Tensor]], None] = lambda *_: None,
) -> dict[str, InputStatistics]:
    """Statistics of every linear in `groups` (lists of names that read the same input).

    Linears of a group share one H tensor; that of experts which saw few tokens is filled up
    (`undersampled_experts.py`).
    Routed experts have no shift: the two streams send them different tokens. advance: the block
    runs to its end and its outputs replace stream.hidden; advance_source: the same of a source that
    runs beside, and of stream.source. judge: `error` will be asked of what is returned; else
    energies are left out. rows: those of a linear of so many rows whose shift and energy are
    wanted. on_batch: told the windows of each batch and the inputs [T, K] of the first linear of
    every group.
    """
    shifts = state.source is not None and stream.source is not None
    collector = _Collector(state, groups, stream, shifts, advance, advance_source, judge)
    if sum(map(len, groups)) < len(state.linears):
        state.replay.look(state.model, state.index, state.current, state.linears, stream.hidden[:1])
    tensors = [stream.hidden]
    if collector.runs_source and stream.source is not None:
        tensors.append(stream.source)
    parts = batches(len(stream.hidden), batch)
    for part, (hidden, *source) in state.model.transfers.batches(tensors, parts):
        on_batch(part, collector.add(part, hidden, *source))
    return collector.finish(stream.group, rows)


@torch.no_grad()
def advance_hidden(state: BlockState, stream: Stream, *, batch: int) -> None:
    """Replaces stream.hidden by what the block gives for it, the bytes of running it all."""
    transfers, parts = state.model.transfers, batches(len(stream.hidden), batch)
    for part, (hidden,) in transfers.batches([stream.hidden], parts):
        with state.replay.resumed(state.current, state.linears, (stream, part.start), last=True):
            output = state.model.run_block(state.index, state.current, hidden)
        transfers.store(stream.hidden[part], output)


class _Collector:
    def __init__(
        self,
        state: BlockState,
        groups: Sequence[Sequence[str]],
        stream: Stream,
        shifts: bool,
        advance: bool,
        advance_source: bool,
        judge: bool,
    ) -> None:
        self.stream = stream
        self.advance, self.advance_source = advance, advance_source
        self.source_linears: dict[str, nn.Module] = {}
        if state.source is not None:
            self.source_linears = state.model.linears(state.source, state.index)
        self.state = state
        self.hessians: dict[str, HessianAccumulator] = {}
        self.drifts: dict[str, _Sums] = {}
        self.shifts: dict[str, _Sums] = {}
        self.owner = {name: group[0] for group in groups for name in group}
        device = state.model.device
        for name, owner in self.owner.items():
            linear = state.model.plan.by_name[name]
            if owner == name:
                self.hessians[name] = HessianAccumulator(
                    linear.columns, device, name=f"the input of {name}"
                )
            if not shifts or linear.routed:
                continue
            if name in state.writers:
                energy: Energy | None = "trace" if judge else None
                self.shifts[name] = _Sums(linear.rows, linear.columns, device, energy)
            elif owner not in self.drifts:
                energy = "squares" if judge else None
                self.drifts[owner] = _Sums(linear.columns, linear.columns, device, energy)
        self.weights = {
            owner: weight.to(device)
            for owner, weight in stream.weights.items()
            if owner in self.hessians
        }
        places = [state.writers.index(name) for name in self.shifts]
        self.writers = state.writers[: max(places, default=-1) + 1]
        self.left_out = self.writers[-1] if self.writers and not judge else None

    @property
    def runs_source(self) -> bool:
        """Whether the source's block runs beside."""
        wanted = self.drifts or self.shifts or self.advance_source
        return self.state.source is not None and bool(wanted)

    def add(self, part: slice, hidden: Tensor, source: Tensor | None = None) -> dict[str, Tensor]:
        """One batch of windows, on the device, with the source's where it runs beside; returns
        inputs [T, K] of the first linear of every group."""
        state, stream = self.state, self.stream
        if self.advance:  # outputs take its place, and a linear may read the block's input itself
            hidden = hidden.clone()
        written = [name for name in self.writers if name != self.left_out]
        batch = (stream, part.start)
        read = self.hessians
        with state.replay.resumed(state.current, state.linears, batch, read=read, written=written):
            x, y, output = self._observe(
                state.current, state.linears, read, written, hidden, whole=self.advance
            )
        if output is not None:
            state.model.transfers.store(stream.hidden[part], output)
        weights = {owner: weight[part].flatten() for owner, weight in self.weights.items()}
        for owner, hessian in self.hessians.items():
            if owner in x:
                hessian.add(x[owner], weights.get(owner))
        whole = self.advance_source
        if state.source is None or stream.source is None or source is None:
            return x
        with state.replay.resumed(
            state.source,
            self.source_linears,
            batch,
            read=self.drifts,
            written=self.writers,
            fixed=True,
            last=whole,
        ):
            x_source, y_source, behind = self._observe(
                state.source, self.source_linears, self.drifts, self.writers, source, whole=whole
            )
        for owner, sums in self.drifts.items():
            sums.add(x_source[owner] - x[owner], x[owner], weights.get(owner))
        if self.shifts:
            exact = torch.float32 if self.left_out is None else hidden.dtype
            drift = (source.to(exact) - hidden).view(-1, hidden.shape[-1])
            for name in self.writers:
                drift += y_source[name]
                if name in y:
                    drift -= y[name]
                elif (bias := getattr(state.linears[name], "bias", None)) is not None:
                    drift -= bias
                if name in self.shifts:
                    owner = self.owner[name]
                    self.shifts[name].add(drift, x[owner], weights.get(owner))
        if behind is not None:
            state.model.transfers.store(stream.source[part], behind)
        return x

    def _observe(
        self,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        read: Iterable[str],
        written: Iterable[str],
        hidden: Tensor,
        *,
        whole: bool = False,
    ) -> Ends:
        return observe_ends(
            self.state.model,
            self.state.index,
            block,
            {name: linears[name] for name in read},
            {name: linears[name] for name in written},
            hidden,
            whole=whole,
        )

    def finish(self, ranks: Ranks, rows: Callable[[int], Rows]) -> dict[str, InputStatistics]:
        check = all_reduce(self.hessians.values(), ranks)
        for sums in (*self.drifts.values(), *self.shifts.values()):
            sums.all_reduce(ranks)
        filled = filled_means(self.hessians)
        means = {n: filled[n] if n in filled else h.mean() for n, h in self.hessians.items()}
        result = {}
        for name, owner in self.owner.items():
            shift, energy = self._shift(name, owner, rows, means[owner])
            tokens = self.hessians[owner].tokens
            result[name] = InputStatistics(means[owner], tokens, check, shift, energy)
        return result

    def _shift(
        self, name: str, owner: str, rows: Callable[[int], Rows], H: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        some = rows(self.state.model.plan.by_name[name].rows)
        if name in self.shifts:
            shift, energy = self.shifts[name].mean(some)
            if name == self.left_out:
                shift -= split_product(self._weights(name, some), H)
            return shift, energy
        if owner in self.drifts:
            return self.drifts[owner].through(self._weights(name, some))
        return None, None

    def _weights(self, name: str, some: Rows) -> Tensor:
        return weight_of(self.state.linears[name]).detach()[some].float()


@torch.no_grad()
def residual_writers(
    model: StreamedModel, index: int, block: nn.Module, hidden: Tensor
) -> tuple[str, ...]:
    """Linears of the block that add their output to the residual stream, in execution order.

    Candidates are linears alone in their step with D output rows. They are accepted together if
    block output = block input + the sum of their outputs on hidden [B, T, D], within the model's
    rounding, else there are none (a norm or a factor after the linear, or experts).
    """
    linears = model.linears(block, index)
    steps = [step for step in model.plan.input_steps(index) if len(step) == 1]
    alone = [group[0] for step in steps for group in step if len(group) == 1]
    rows = {linear.name: linear.rows for linear in model.plan.block_linears(index)}
    names = tuple(name for name in alone if rows[name] == hidden.shape[-1])
    if not names:
        return ()
    hidden = hidden.to(model.device, model.dtype)
    seen = observe(model, index, block, {name: linears[name] for name in names}, hidden)
    output = model.run_block(index, block, hidden).float()
    written = torch.stack([seen[name].y.float().flatten() for name in names])
    added = (output - hidden.float()).flatten()
    missing = (added - written.sum(0)).norm() / output.norm()
    factors = torch.linalg.lstsq((written @ written.T).cpu(), (written @ added).cpu()).solution
    allowed = max(RESIDUAL_TOLERANCE, RESIDUAL_ROUNDINGS * torch.finfo(model.dtype).eps)
    whole = float((factors - 1).abs().max()) < COEFFICIENT_TOLERANCE
    return names if whole and float(missing) < allowed else ()
