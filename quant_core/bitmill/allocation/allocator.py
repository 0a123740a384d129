"""Giving every group a width: budget in, bit-width map out. Pure numbers, no torch, deterministic.

    uniform   the largest width that fits, everywhere
    sba       SliM-LLM: p least salient groups one bit less, p most salient one bit more, per
              linear p = argmin of the recorded output KL; balanced in columns
    knapsack  minimize the profile's predicted loss over all groups of all linears at once
    map       a given map, checked

Groups that must agree form one unit (`groups.py`). A unit's cost and weight are sums over its
groups, and one knapsack over units serves every constraint.

`size` counts headers, which do not add up over groups. The largest payload whose checkpoint fits
is searched downwards over a grid of limit / 2048 bytes that does not depend on the solution, so a
larger budget never gives a worse map; at most 1/2048 of the budget is given up for that.

Given up: the rest of `uniform` and `sba` budgets stays unspent, by definition of the methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property

import numpy as np

from bitmill.allocation.groups import GroupTable, GroupWidths
from bitmill.allocation.knapsack import FloatArray, IntArray, Knapsack
from bitmill.allocation.outliers import outlier_choices, prices
from bitmill.allocation.profile import SensitivityProfile
from bitmill.allocation.sba import sba_swaps, sba_widths
from bitmill.config.bit_width_map import NO_OUTLIERS, PLANES, BitWidthMap
from bitmill.config.closed import Closed
from bitmill.config.codes import check_widths
from bitmill.config.quantization import Allocation, Budget, Kind, QuantizationConfig
from bitmill.errors import BudgetError, SpecError
from bitmill.formats.accounting import describe, limit, measure_map, value
from bitmill.plan.model_plan import Plan
from bitmill.plan.serving_memory import beside_weights

SIZE_GRID = 2048
HEADER_SLACK_PER_TENSOR = 8


class CurvePoint(Closed):
    """One map on the curve of size (bytes of all files) against predicted loss (nats per token)."""

    size: int
    bits: float
    code_bits: float
    predicted_loss: float


def allocate(
    plan: Plan,
    config: QuantizationConfig,
    profile: SensitivityProfile | None = None,
) -> BitWidthMap:
    """The map that the configuration asks for. `knapsack` and `sba` need the profile.

    Raises `BudgetError` naming the smallest budget that would fit, `SpecError` for constraints
    that exclude each other, `FormatError` for a profile or map of another model.
    """
    if config.allocation.map is not None:
        return check_map(plan, config, config.allocation.map)
    return Allocator(plan, config.allocation, profile).map(config.budget)


def check_budget(plan: Plan, config: QuantizationConfig) -> None:
    """Raise `BudgetError` where no map can meet the budget; needs no profile and no weights."""
    if config.allocation.map is not None:
        check_map(plan, config, config.allocation.map)
        return
    allocator = Allocator(plan, config.allocation)
    if config.allocation.method == "sba":
        allocator.sba_base(config.budget)
    else:
        allocator.uniform(config.budget)


def curve(
    profile: SensitivityProfile, plan: Plan, allocation: Allocation, points: int = 32
) -> list[CurvePoint]:
    """Knapsack maps from the smallest to the largest stored size, evenly spaced in bytes."""
    return Allocator(plan, allocation, profile).curve(points)


def check_map(plan: Plan, config: QuantizationConfig, given: BitWidthMap) -> BitWidthMap:
    """The given map, if it fits the model, the column order asked for and the budget."""
    given.check_shapes(plan.shapes)
    for matrix in plan.embeddings:
        check_widths("affine", given.linears[matrix.name], f"allocation.map.linears.{matrix.name}")
    if given.order != config.allocation.order:
        raise SpecError(
            f"the map's groups are in {given.order} order but allocation.order is "
            f"{config.allocation.order!r}: set allocation.order to {given.order!r}",
            param="allocation.order",
        )
    taken = measure_map(plan, given, config.budget.kind)
    if taken > limit(plan, config.budget):
        raise _too_small(plan, config.budget, taken, "the given map takes")
    return given


class Allocator:
    """One plan and one set of constraints, maybe with a profile; serves any number of budgets.

    outliers: columns that linears keep in 16 bits in every map made here, by linear; costs are
    those of such linears (`SensitivityProfile.keeping`).
    """

    def __init__(
        self,
        plan: Plan,
        allocation: Allocation,
        profile: SensitivityProfile | None = None,
        outliers: Mapping[str, int] = NO_OUTLIERS,
    ) -> None:
        self.plan = plan
        self.allocation = allocation
        self.groups = GroupTable(plan, allocation, outliers)
        self._legal: list[int] = self.groups.widths.tolist()
        self._profile = profile
        self._solvers: dict[Kind, Knapsack] = {}
        if profile is not None:
            profile.check_shapes(plan.shapes)
            self._profile = profile.keeping(outliers)

    @property
    def profile(self) -> SensitivityProfile:
        """The profile, where the method needs one; raises `SpecError` without it."""
        if self._profile is None:
            raise SpecError(
                f"allocation method {self.allocation.method!r} needs a sensitivity profile",
                param="allocation.method",
            )
        return self._profile

    def map(self, budget: Budget) -> BitWidthMap:
        """The map of the allocation's method: `uniform`, `sba` or `knapsack`.

        Of a target of loss, the smallest whose predicted loss is within it.
        """
        if budget.max_loss_increase is not None:
            return self.within_loss(budget.max_loss_increase)
        methods = {"uniform": self.uniform, "sba": self.sba, "knapsack": self.knapsack}
        return methods[self.allocation.method](budget)

    def uniform(self, budget: Budget) -> BitWidthMap:
        """The largest single width that fits (edge blocks: at least `edge_min_bits`)."""
        return self._map(self.groups.uniform(self._largest(budget, self._legal)))

    def sba_base(self, budget: Budget) -> int:
        """The base width at which `sba` profiles and allocates: the largest that fits."""
        bases = [b for b in self._legal if {b - 1, b + 1} <= set(self._legal)]
        if not bases or self.allocation.per_linear:
            raise SpecError(
                f"sba mixes widths b-1, b and b+1 inside a linear: widths {self._legal} with "
                f"per_linear {self.allocation.per_linear} leave no base width; use 'uniform'",
                param="allocation.widths",
            )
        return self._largest(budget, bases)

    def sba(self, budget: Budget) -> BitWidthMap:
        """SliM-LLM's map at the largest base width that fits.

        Where zero points or headers of mixed widths cross the budget, the linears that gain least
        stay uniform.
        """
        base = self.sba_base(budget)
        swaps = sba_swaps(self.groups, self.profile, base)
        order = sorted(swaps, key=lambda i: (swaps[i].gain, i))
        for kept in range(len(order) + 1):
            flat = sba_widths(self.groups, base, {i: swaps[i] for i in order[kept:]})
            if self._fits(flat, budget):
                return self._map(flat)
        return self._map(self.groups.uniform(base))

    def knapsack(self, budget: Budget) -> BitWidthMap:
        """The map of least predicted loss; never worse than a uniform or sba map that fits, nor
        with outliers than without."""
        best, loss = self._knapsack(budget)
        for outliers in self._outlier_choices():
            other = Allocator(self.plan, self.allocation, self.profile, outliers)
            with suppress(BudgetError):
                found, predicted = other._knapsack(budget)
                if predicted < loss:
                    best, loss = found, predicted
        return best

    def _knapsack(self, budget: Budget) -> tuple[BitWidthMap, float]:
        """Map and predicted loss with the allocator's own outliers."""
        best = self._solve_size(budget) if budget.in_bytes else self._solve(budget)
        loss = self.predicted(best)
        for flat in self._simple_maps():
            other = self.predicted(flat)
            if other < loss and self._fits(flat, budget):
                best, loss = flat, other
        return self._map(best), loss

    def _outlier_choices(self) -> list[dict[str, int]]:
        if not self.allocation.outliers:
            return []
        edges = self._solver("bits").edges
        return outlier_choices(self.groups, self.profile, prices(edges.gain, edges.weight))

    def within_loss(self, most: float) -> BitWidthMap:
        """The smallest knapsack map whose predicted loss is at most `most` nats a token.

        The one of least loss where none is.
        """
        solver = self._solver("bits")
        least, enough = solver.minimum, int(solver.weight.max(axis=1).sum())
        while least < enough:
            capacity = (least + enough) // 2
            if solver.cost_of(solver.solve(capacity)) <= most:
                enough = capacity
            else:
                least = capacity + 1
        return self._map(self._flat(solver.solve(enough)))

    def curve(self, points: int = 32) -> list[CurvePoint]:
        """See `curve`."""
        return [self.point(flat) for flat in self.maps(points)]

    def maps(self, points: int) -> list[GroupWidths]:
        """The maps of the curve: at most `points` of them, the smallest first."""
        solver = self._solver("bits")
        largest = solver.weight_of(solver.solve(int(solver.weight.max(axis=1).sum())))
        capacities = np.linspace(solver.minimum, largest, points).astype(np.int64)
        return [self._flat(solver.solve(int(c))) for c in np.unique(capacities)]

    def point(self, flat: GroupWidths) -> CurvePoint:
        """Size and predicted loss of the widths of all groups."""
        code_bits, bits = (self.groups.measure(flat, kind) for kind in ("code_bits", "bits"))
        return CurvePoint(
            size=self.groups.measure(flat, "size"),
            bits=float(value(self.plan, "bits", bits)),
            code_bits=float(value(self.plan, "code_bits", code_bits)),
            predicted_loss=self.predicted(flat),
        )

    def predicted(self, flat: GroupWidths) -> float:
        """Predicted loss, nats per token, of the widths of all groups."""
        return float(self.costs[np.arange(len(flat)), self.groups.column(flat)].sum())

    @cached_property
    def costs(self) -> FloatArray:
        """Costs of all groups at the legal widths: float64 [T, B]."""
        missing = sorted(set(self._legal) - set(self.profile.widths))
        if missing:
            raise SpecError(
                f"widths {missing} are not in the profile, which has "
                f"{list(self.profile.widths)}: leave them out or make a new profile",
                param="allocation.widths",
            )
        take = np.searchsorted(np.array(self.profile.widths), self.groups.widths)
        return np.concatenate(
            [self.profile.linear(linear.name).costs[:, take] for linear in self.plan.matrices]
        )

    def _solver(self, kind: Kind) -> Knapsack:
        """The knapsack over units that counts code bits, or stored bytes for the other kinds."""
        counted: Kind = "code_bits" if kind == "code_bits" else "bits"
        if counted not in self._solvers:
            unit = self.groups.unit
            shape = (int(unit.max()) + 1, len(self._legal))
            weight = np.zeros(shape, dtype=np.int64)
            cost, allowed = np.zeros(shape), np.ones(shape, dtype=np.bool_)
            np.add.at(weight, unit, self.groups.weights(counted))
            np.add.at(cost, unit, self.costs)
            np.logical_and.at(allowed, unit, self.groups.allowed)
            self._solvers[counted] = Knapsack(weight, cost, allowed)
        return self._solvers[counted]

    def _solve(self, budget: Budget) -> GroupWidths:
        """`code_bits` and `bits` are sums over groups."""
        fixed, solver = self.groups.fixed(budget.kind), self._solver(budget.kind)
        capacity = limit(self.plan, budget) - fixed
        if solver.minimum > capacity:
            raise _too_small(self.plan, budget, solver.minimum + fixed)
        return self._flat(solver.solve(capacity))

    def _solve_size(self, budget: Budget) -> GroupWidths:
        solver, capacity = self._solver("size"), limit(self.plan, budget)
        step = max(1, capacity // SIZE_GRID)
        payload = (capacity - self._smallest_rest) // step * step
        while payload >= solver.minimum:
            choice = solver.solve(payload)
            flat = self._flat(choice)
            if self._fits(flat, budget):
                return flat
            payload = min(payload - step, (solver.weight_of(choice) - 1) // step * step)
        flat = self._flat(solver.smallest)
        if not self._fits(flat, budget):
            lowest = self.groups.uniform(self._legal[0])
            sizes = [self.groups.measure(widths, "size") for widths in (flat, lowest)]
            raise _too_small(self.plan, budget, min(sizes))
        return flat

    @cached_property
    def _smallest_rest(self) -> int:
        """Bytes of the checkpoint besides groups, as few as they can be.

        A header is shortest with the fewest planes and the smallest offsets.
        """
        plain = [b for b in self._legal if len(PLANES.get(b, ())) == 1]
        maps = [self.groups.uniform(width) for width in {self._legal[0], *plain[:1]}]
        rest = [self.groups.measure(m, "size") - self.groups.measure(m, "bits") for m in maps]
        tensors = len(self.plan.tensors) + 5 * len(self.plan.matrices)
        slack = HEADER_SLACK_PER_TENSOR * tensors
        return min(rest) + self.groups.fixed("bits") - slack

    def _simple_maps(self) -> Iterator[GroupWidths]:
        """Uniform and sba maps of every base width that the constraints allow."""
        for width in self._legal:
            yield self.groups.uniform(width)
        if self.allocation.per_linear:
            return
        for base in self.profile.sba:
            if {base - 1, base, base + 1} <= set(self._legal):
                swaps = sba_swaps(self.groups, self.profile, base)
                yield sba_widths(self.groups, base, swaps)

    def _largest(self, budget: Budget, candidates: list[int]) -> int:
        for width in reversed(candidates):
            if self._fits(self.groups.uniform(width), budget):
                return width
        lowest = self.groups.uniform(candidates[0])
        raise _too_small(self.plan, budget, self.groups.measure(lowest, budget.kind))

    def _flat(self, choice: IntArray) -> GroupWidths:
        return self.groups.widths[choice][self.groups.unit]

    def _map(self, flat: GroupWidths) -> BitWidthMap:
        return BitWidthMap(
            order=self.allocation.order,
            linears=self.groups.named(flat),
            outliers=dict(self.groups.outliers),
        )

    def _fits(self, flat: GroupWidths, budget: Budget) -> bool:
        return self.groups.measure(flat, budget.kind) <= limit(self.plan, budget)


def _too_small(plan: Plan, budget: Budget, smallest: int, what: str = "") -> BudgetError:
    beside = beside_weights(plan, budget)
    needed = describe(plan, budget.kind, smallest + beside)
    given = f"{budget.value:,} bytes" if budget.in_bytes else f"{budget.value}"
    reason = f"{what} {needed}" if what else f"the smallest that fits the constraints is {needed}"
    if beside:
        reason += f", {beside:,} of them for {budget.batch} x {budget.context} tokens and workspace"
    return BudgetError(
        f"budget {budget.kind} = {given} cannot be met: {reason}",
        param=f"budget.{budget.kind}",
    )
