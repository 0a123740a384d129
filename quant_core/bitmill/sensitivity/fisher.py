"""Measuring the sensitivity profile: what each width costs each group, in nats per token.

To second order, a change D of one linear's weights raises the mean loss of P predicted tokens by

    1/(2P) sum_t (g_t^T D x_t)^2  ~  1/2 sum_n q_n  d_n H d_n^T        d_n: row n of D
    q_n = 1/P sum_t g_tn^2                g: gradient of the summed loss at the linear's output
    H   = sum_t a_t x_t x_t^T / sum_t a_t           a_t = sum_n g_tn^2

(Fisher information with rows taken as independent, as in Kronecker-factored curvature, arXiv
1503.05671, section 3, but for the weights a_t: tokens that excite some inputs strongly need not be
those with large gradients, and the plain mean of x x^T overstates such inputs, up to 25 times in
down projections of Gemma 3 270M.) One backward pass gives q and H for every linear
(`calibration/gradients.py`). Columns are ordered by the plain mean of x^2, which siblings share.

The cost of width b for group j comes from the real quantizer: its grid search, then the GPTQ column
loop inside the group, whose normalized errors e_k / U_kk are exactly what is left of D H D^T once
all later columns have compensated. Every group is measured on the source's weights.

A dropped group, of width 0, costs its whole energy d H d^T with d = w. Nothing is taken off for
later columns: those that would compensate may be dropped too, as whole linears often are.

Of a linear with more than `rows` outputs, a sample is quantized: rows at equal steps of the
cumulated q_n, so that a row stands for its share of q; rows above one step are always taken. All
groups and widths use the same rows, so their ratios vary less than the costs themselves.

Given up: interaction between groups and linears (costs add up), and terms beyond second order,
which at 1 and 2 bits are not small: compare predicted with measured loss before trusting those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bitmill.allocation.profile import (
    FloatArray,
    IndexArray,
    LinearProfile,
    ProfileConfig,
    ProfileOrigin,
    SensitivityProfile,
)
from bitmill.calibration.gradients import BlockObserver, GradientPass, PassSettings, Together
from bitmill.calibration.hessian import HessianAccumulator, all_reduce
from bitmill.calibration.kept_weights import KeptWeights
from bitmill.calibration.loss_weights import GradientEnergies
from bitmill.calibration.undersampled_experts import fill_squares, filled_means
from bitmill.config.bit_width_map import DROPPED
from bitmill.errors import CalibrationError
from bitmill.models.streamed import StreamedModel, weight_of
from bitmill.plan.model_plan import Plan
from bitmill.quant.codes import group_slices, row_errors
from bitmill.quant.grid import (
    ClipSettings,
    clip_search,
    clip_search_groups,
    max_code,
    one_bit_groups,
    relative_weights,
    round_scale,
)
from bitmill.quant.rewrites import NO_REWRITES, Rewrites
from bitmill.quant.rotation import packed_rewrites
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.runtime.timer import timed
from bitmill.sensitivity.checkpoint import ProfileCheckpoint
from bitmill.sensitivity.trellis import trellis_costs
from bitmill.solvers.factor import activation_order
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.grid_search import unit_rows
from bitmill.transforms.outliers import OutlierColumns
from bitmill_kernels.backend import resolve_backend
from bitmill_kernels.gptq.block import gptq_block
from bitmill_kernels.layout import group_count

PROFILE_CLIP: Mapping[int, ClipSettings] = {
    width: ClipSettings(smallest, shrinks, zero_offsets=(), least_squares=1)
    for width, (smallest, shrinks) in {
        1: (0.3, 1),
        2: (0.4, 8),
        3: (0.5, 6),
        4: (0.65, 5),
        5: (0.8, 3),
        6: (0.85, 3),
        8: (0.9, 2),
    }.items()
}
"""A grid search of fewer candidates per width; costs come out 0 to 4 % above the full search's."""


@dataclass(frozen=True)
class SensitivitySettings:
    """What is measured, and how.

    widths: candidates, ascending. rows: outputs of a linear that are quantized, see above. code:
    of the groups (`config/codes.py`). outliers: numbers of outlier columns that costs are measured
    with, besides none.
    """

    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    order: Literal["natural", "activation"] = "activation"
    rows: int = 512
    code: str = "affine"
    outliers: tuple[int, ...] = ()
    gradients: PassSettings = field(default_factory=PassSettings)


class BlockMoments:
    """Accumulates the moments of one block's linears; a `BlockObserver`.

    `all_reduce` and `fill` follow the last token; the other methods follow those.

    groups: names that read the same input; the first of each stands for it.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[str]],
        linears: Mapping[str, tuple[int, int]],
        device: torch.device,
    ) -> None:
        self._owner = {name: group[0] for group in groups for name in group}
        self._energies = {
            group[0]: HessianAccumulator(linears[group[0]][1], device, name=group[0], diagonal=True)
            for group in groups
        }
        self._squares = {
            name: torch.zeros(rows, dtype=torch.float64, device=device)
            for name, (rows, _) in linears.items()
        }
        self._weighted = {
            name: HessianAccumulator(columns, device, name=name)
            for name, (_, columns) in linears.items()
        }
        self._filled: dict[str, Tensor] = {}
        self._filled_energies: dict[str, Tensor] = {}

    def seen(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add one batch: x [T, K], gradient [T, N]."""
        norms = torch.linalg.vector_norm(gradient, dim=0, dtype=torch.float32)
        self._squares[name] += norms.double().square()
        if self._owner[name] == name:
            self._energies[name].add(x)
        norms = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float32)
        self._weighted[name].add(x, norms.square())

    def all_reduce(self, group: Ranks) -> None:
        """Add what the other ranks have seen."""
        check = all_reduce((*self._energies.values(), *self._weighted.values()), group)
        group.all_reduce(*self._squares.values())
        check()

    def fill(self) -> None:
        """Fill up what starved experts saw."""
        self._filled = filled_means(self._weighted)
        self._filled_energies = filled_means(self._energies)
        filled = fill_squares(self._squares, self._weighted)
        self._squares = {name: squares.cpu() for name, squares in filled.items()}

    def energy(self, name: str) -> Tensor:
        """Mean of x^2 f32 [K] of a linear's input."""
        owner = self._owner[name]
        if owner in self._filled_energies:
            return self._filled_energies[owner]
        return self._energies[owner].mean()

    def weighted(self, name: str) -> Tensor:
        """H f32 [K, K] of a linear's input, weighted by the gradients at its output."""
        return self._filled[name] if name in self._filled else self._weighted[name].mean()

    def row_weight(self, name: str, predictions: int) -> Tensor:
        """q f64 [N] of a linear, on the CPU."""
        return self._squares[name] / predictions


def profile_knapsack(
    model: StreamedModel,
    tokens: Tensor,
    plan: Plan,
    settings: SensitivitySettings | None = None,
    *,
    origin: ProfileOrigin | None = None,
    folder: Path | None = None,
    on_block: Callable[[int, int], None] | None = None,
    group: Ranks = SINGLE,
    weights: KeptWeights | None = None,
) -> SensitivityProfile:
    """The profile of a model on windows of tokens, int64 [S, T].

    origin: what the profile says it was made from. folder: where finished blocks (and, spilled,
    block inputs) are kept; a killed run that is started again with the same arguments goes on there
    and returns the same bytes. on_block(done, total): after each of the 2 L block passes, forward
    and backward. group: ranks that make this call together: windows are divided, then the inputs
    whose linears are measured. weights: where those of tokens and rows are left.

    Raises `CalibrationError` and `NumericalError` naming the linear at fault.
    """
    settings = settings or SensitivitySettings()
    if origin is None:
        config = ProfileConfig(kind="knapsack", widths=settings.widths, order=settings.order)
        origin = ProfileOrigin(config)
    measurement = _Measurement(model, plan, settings, origin, folder, group, weights)
    run = GradientPass(model, tokens, settings.gradients, scratch=folder, group=group)
    blocks = measurement.run(run, tokens.shape, on_block)
    linears = [blocks[linear.block].linear(linear.name) for linear in plan.linears]
    return SensitivityProfile(
        origin=origin,
        widths=settings.widths,
        linears=tuple(linears),
        orders={owner: order for block in blocks for owner, order in block.orders.items()},
        outliers=settings.outliers,
    )


class _Measurement:
    """Turns moments into costs block by block, with a checkpoint after each."""

    def __init__(
        self,
        model: StreamedModel,
        plan: Plan,
        settings: SensitivitySettings,
        origin: ProfileOrigin,
        folder: Path | None,
        group: Ranks,
        weights: KeptWeights | None,
    ) -> None:
        self._model, self._plan, self._settings = model, plan, settings
        self._origin, self._ranks = origin, group
        self._saved = ProfileCheckpoint(folder, group)
        self._weights = weights
        self._moments: dict[int, BlockMoments] = {}
        self._energies: dict[int, GradientEnergies] = {}

    def run(
        self,
        gradients: GradientPass,
        shape: torch.Size,
        on_block: Callable[[int, int], None] | None,
    ) -> list[SensitivityProfile]:
        count = self._plan.block_count
        found = {i: block for i in range(count) if (block := self._load(i)) is not None}

        def observer(i: int) -> BlockObserver | None:
            if i in found:
                return None
            shapes = {li.name: (li.rows, li.columns) for li in self._plan.block_linears(i)}
            groups = self._plan.siblings(i)
            self._moments[i] = BlockMoments(groups, shapes, self._model.device)
            if self._weights is None:
                return self._moments[i]
            self._energies[i] = GradientEnergies()
            return Together(self._moments[i], self._energies[i])

        def done(i: int, gradient: Tensor) -> None:
            if i not in found:
                if self._weights is not None:
                    energies = self._energies.pop(i)
                    found_weights = energies.weights(self._plan, i, shape[1], self._ranks)
                    if self._ranks.first:
                        self._weights.save(i, found_weights)
                moments, block = self._moments.pop(i), gradients.source_block(i)
                found[i] = self._measure(i, block, moments, gradients.predictions)
                self._saved.save(i, found[i])
            self._saved.save_gradient(i, gradient)
            report(2 * count - i)

        def report(finished: int) -> None:
            if on_block:
                on_block(finished, 2 * count)

        if len(found) < count:
            gradients.run(
                observer,
                resume=self._resume(found),
                on_block=done,
                on_forward=lambda i: report(i + 1),
            )
        self._saved.drop_gradients()
        return [found[i] for i in range(count)]

    def _resume(self, found: Mapping[int, SensitivityProfile]) -> tuple[int, Tensor] | None:
        """Where the pass goes on: at a saved gradient, unless a block that it has left behind is to
        be measured again, because its weights are gone."""
        saved = self._saved.gradient()
        if saved is None or all(i in found for i in range(saved[0], self._plan.block_count)):
            return saved
        self._saved.drop_gradients()
        return None

    def _load(self, i: int) -> SensitivityProfile | None:
        """A finished block, whose weights for refinement are there too where they are wanted."""
        if self._weights is not None:
            has = self._ranks.first and self._weights.has(i)
            if not self._ranks.broadcast(has):
                return None
        return self._saved.load(i)

    @torch.no_grad()
    def _measure(
        self, i: int, block: nn.Module, moments: BlockMoments, predictions: int
    ) -> SensitivityProfile:
        modules = self._model.linears(block, i)
        moments.all_reduce(self._ranks)
        moments.fill()
        groups = self._plan.siblings(i)
        owners = self._ranks.owners([self._columns(group) for group in groups])
        mine = [
            self._measure_group(group, modules, moments, predictions)
            if owner == self._ranks.rank
            else None
            for group, owner in zip(groups, owners, strict=True)
        ]
        every = self._ranks.gather(mine)
        measured = [found for g, owner in enumerate(owners) if (found := every[owner][g])]
        return SensitivityProfile(
            origin=self._origin,
            widths=self._settings.widths,
            linears=tuple(linear for linears, _ in measured for linear in linears),
            orders={
                group[0]: order
                for group, (_, order) in zip(groups, measured, strict=True)
                if order is not None
            },
            outliers=self._settings.outliers,
        )

    def _columns(self, group: Sequence[str]) -> int:
        """What measuring grows with: every group of columns is searched once per width."""
        return sum(self._plan.by_name[name].columns for name in group)

    def _measure_group(
        self,
        group: Sequence[str],
        modules: Mapping[str, nn.Module],
        moments: BlockMoments,
        predictions: int,
    ) -> tuple[list[LinearProfile], IndexArray | None]:
        """Linears that read one input share its order."""
        order: Tensor | None = None
        if self._settings.order == "activation":
            order = activation_order(moments.energy(group[0]))
        rewrites = packed_rewrites(self._settings.code, order)
        linears = []
        for name in group:
            H = rewrites.hessian(moments.weighted(name))
            curvature = Curvature.prepare(H, name=name)
            weight = weight_of(modules[name]).detach()
            row_weight = moments.row_weight(name, predictions)
            with timed("cost"):
                if self._settings.code == "trellis":
                    upper, rates = curvature.factor.upper, self._settings.widths
                    table = trellis_costs(weight, row_weight, upper, rates, rewrites)
                else:
                    table = linear_costs(weight, row_weight, curvature, self._settings, rewrites)
                kept = [
                    self._with_outliers(name, count, weight, row_weight, H, rewrites)
                    for count in self._settings.outliers
                ]
            for costs in (table, *kept):
                _check_costs(name, costs)
            linear = self._plan.by_name[name]
            owner = None if order is None else group[0]
            tables = np.stack(kept) if kept else np.zeros((0, *table.shape))
            linears.append(LinearProfile(name, linear.rows, linear.columns, table, owner, tables))
        return linears, None if order is None else _index_array(order)

    def _with_outliers(
        self,
        name: str,
        count: int,
        weight: Tensor,
        row_weight: Tensor,
        H: Tensor,
        rewrites: Rewrites,
    ) -> FloatArray:
        """Costs with so many outlier columns; H: [K, K] behind the rewrites."""
        count = min(count, weight.shape[1] - 1)
        packed = {name: rewrites.weights(weight.float())}
        fitted = OutlierColumns({name: count}).fit(packed, H, SINGLE)[name]
        curvature = Curvature.prepare(fitted.hessian(H), name=name)
        every = Rewrites([*rewrites, fitted])
        return linear_costs(weight, row_weight, curvature, self._settings, every)


def _check_costs(name: str, costs: FloatArray) -> None:
    if not np.isfinite(costs).all():
        raise CalibrationError(
            f"the costs of {name} are not finite: its gradients or inputs are too large "
            "for fp32; use other calibration text",
            code="non_finite_costs",
            param=name,
        )


def linear_costs(
    W: Tensor,
    row_weight: Tensor,
    curvature: Curvature,
    settings: SensitivitySettings,
    rewrites: Rewrites = NO_REWRITES,
) -> FloatArray:
    """Costs float64 [G, B], nats per token, of every width for every group of a linear.

    W: [N, K] in the source's columns; row_weight: [N]. curvature: that of the input behind the
    rewrites, in whose columns the groups lie.
    """
    chosen, share = sample_rows(row_weight, settings.rows)
    rows = rewrites.weights(W[chosen.to(W.device)].float())
    losses = _row_losses(rows, curvature, settings.widths).double()
    table = (0.5 * share.to(W.device) * losses).sum(2).T.clamp(min=0.0).cpu()
    costs: FloatArray = table.numpy()
    return costs


def _row_losses(W: Tensor, curvature: Curvature, widths: Sequence[int]) -> Tensor:
    """d H d^T f32 [B, G, M] of every width, group and row of W f32 [M, K] in packed columns."""
    if DROPPED in widths:
        others = [width for width in widths if width != DROPPED]
        return torch.cat([_energies(W, curvature.H)[None], _row_losses(W, curvature, others)])
    if resolve_backend("auto", W.device) == "triton":
        return _losses_on_device(W, curvature, widths)
    U, weight = curvature.factor.upper, curvature.H.diagonal()
    losses = []
    for _, part in group_slices(W.shape[1]):
        block, own = W[:, part].contiguous(), U[part, part]
        unit, diagonal = unit_rows(own).contiguous(), own.diagonal()
        for width in widths:
            grid = clip_search(block, width, weight[part], settings=PROFILE_CLIP[width])
            _, error = gptq_block(block, unit, grid.scale, grid.zero, max_code(width))
            losses.append((error / diagonal).square().sum(1))
    return torch.stack(losses).view(-1, len(widths), len(W)).transpose(0, 1)


def _energies(W: Tensor, H: Tensor) -> Tensor:
    """w H w^T f32 [G, M] of every group and row of W f32 [M, K] in packed columns."""
    parts = [part for _, part in group_slices(W.shape[1])]
    return torch.stack([row_errors(W[:, part], H[part, part]).float() for part in parts])


def _losses_on_device(W: Tensor, curvature: Curvature, widths: Sequence[int]) -> Tensor:
    """`_row_losses` by one search per width and one launch that quantizes all of them."""
    from bitmill_kernels.gptq.group_solve_triton import group_losses_triton

    U = curvature.factor.upper
    weight = relative_weights(curvature.H.diagonal())
    columns = W.T.contiguous()
    shape = (group_count(W.shape[1]), len(W))
    grids, tops = [], []
    for width in widths:
        clip = PROFILE_CLIP[width]
        tops.append(torch.full(shape, float(max_code(width)), device=W.device))
        if width == 1:
            grids.append(one_bit_groups(W, weight, clip))
        else:
            grids.append(clip_search_groups(columns, tops[-1], weight, clip))
    losses = group_losses_triton(
        columns.repeat(1, len(grids)),
        U,
        round_scale(torch.cat([grid.scale for grid in grids], 1)),
        torch.cat([grid.zero for grid in grids], 1),
        torch.cat(tops, 1),
    )
    return losses.view(-1, len(grids), len(W)).transpose(0, 1)


class RowSample(NamedTuple):
    """Rows that stand for all: indices i64 [M] ascending and their weights f64 [M], on the CPU."""

    chosen: Tensor
    share: Tensor


def sample_rows(row_weight: Tensor, count: int) -> RowSample:
    """At most `count` rows of a linear with the weights [N].

    Their weights add up to those of all rows. A row is taken with probability in proportion to its
    weight, at equal steps of the cumulated weight, without chance.
    """
    weight = row_weight.detach().cpu().double()
    if len(weight) <= count or not bool(weight.sum() > 0):
        return RowSample(torch.arange(len(weight)), weight)
    certain = torch.zeros(len(weight), dtype=torch.bool)
    while True:
        rest = torch.where(certain, 0.0, weight)
        step = rest.sum() / (count - int(certain.sum()))
        larger = (rest >= step) & ~certain
        if not bool(larger.any()) or int((certain | larger).sum()) >= count:
            break
        certain |= larger
    places = (torch.arange(count - int(certain.sum())) + 0.5) * step
    drawn = torch.searchsorted(rest.cumsum(0), places).clamp(max=len(weight) - 1)
    share = torch.where(certain, weight, 0.0)
    share.index_add_(0, drawn, torch.full((len(drawn),), float(step), dtype=torch.float64))
    chosen = share.nonzero()[:, 0]
    return RowSample(chosen, share[chosen])


def _index_array(order: Tensor) -> IndexArray:
    array: IndexArray = order.cpu().numpy().astype(np.int32)
    return array
