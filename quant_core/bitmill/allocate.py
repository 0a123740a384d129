"""Giving every group a width: budget in, bit-width map out. Pure numbers, no torch, deterministic.

    uniform   the largest width that fits, everywhere
    sba       SliM-LLM: p least salient groups one bit less, p most salient one bit more, per
              linear p = argmin of the recorded output KL; balanced in columns
    knapsack  minimize the profile's predicted loss over all groups of all linears at once
    map       a given map, checked

Groups that must agree form one unit: the same group of fused siblings, or all groups of a linear
where it needs one width. A unit's cost and weight are sums over its groups, and one knapsack over
units serves every constraint.

`size` counts headers, which do not add up over groups. The largest payload whose checkpoint fits
is searched downwards over a grid of limit / 2048 bytes that does not depend on the solution, so a
larger budget never gives a worse map; at most 1/2048 of the budget is given up for that.

Given up: the rest of `uniform` and `sba` budgets stays unspent, by definition of the methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from bitmill.bits import PLANES, BitWidthMap, group_columns
from bitmill.budget import (
    Kind,
    describe,
    group_weight,
    limit,
    measure,
    order_bytes,
    value,
)
from bitmill.errors import BudgetError, SpecError
from bitmill.knapsack import BoolArray, FloatArray, IntArray, Knapsack
from bitmill.plan import Plan
from bitmill.profile import SensitivityProfile
from bitmill.spec import Allocation, Budget, JobSpec

SIZE_GRID = 2048
HEADER_SLACK_PER_TENSOR = 8

GroupWidths = npt.NDArray[np.int64]
"""Width of every group of every linear, in the plan's order: [sum of G]."""


@dataclass(frozen=True)
class CurvePoint:
    """One map on the curve of size against predicted loss (nats per token)."""

    size: int
    bits: float
    code_bits: float
    predicted_loss: float


def allocate(
    plan: Plan,
    spec: JobSpec,
    profile: SensitivityProfile | None = None,
    given_map: BitWidthMap | None = None,
) -> BitWidthMap:
    """The map of a job. `knapsack` and `sba` need the profile, `map` the given map.

    Raises `BudgetError` naming the smallest budget that would fit, `SpecError` for constraints
    that exclude each other, `FormatError` for a profile or map of another model.
    """
    method = spec.allocation.method
    if method == "map":
        if given_map is None:
            raise SpecError("allocation method 'map' needs a map", param="allocation.map")
        return check_map(plan, spec, given_map)
    allocator = Allocator(plan, spec.allocation, profile)
    methods = {
        "uniform": allocator.uniform,
        "sba": allocator.sba,
        "knapsack": allocator.knapsack,
    }
    return methods[method](spec.budget)


def check_budget(plan: Plan, spec: JobSpec, given_map: BitWidthMap | None = None) -> None:
    """Raise `BudgetError` where no map can meet the budget; needs no profile and no weights."""
    if spec.allocation.method == "map":
        if given_map is not None:
            check_map(plan, spec, given_map)
        return
    allocator = Allocator(plan, spec.allocation)
    if spec.allocation.method == "sba":
        allocator.sba_base(spec.budget)
    else:
        allocator.uniform(spec.budget)


def curve(
    profile: SensitivityProfile, plan: Plan, allocation: Allocation, points: int = 32
) -> list[CurvePoint]:
    """Knapsack maps from the smallest to the largest stored size, evenly spaced in bytes."""
    return Allocator(plan, allocation, profile).curve(points)


def check_map(plan: Plan, spec: JobSpec, given: BitWidthMap) -> BitWidthMap:
    """The given map, if it fits the model, the column order asked for and the budget."""
    given.check_shapes(plan.shapes)
    if given.order != spec.allocation.order:
        raise SpecError(
            f"the map's groups are in {given.order} order but allocation.order is "
            f"{spec.allocation.order!r}: set allocation.order to {given.order!r}",
            param="allocation.order",
        )
    kind = spec.budget.kind
    taken = measure(plan, given.linears, given.order, kind)
    if taken > limit(plan, spec.budget):
        raise _too_small(plan, spec.budget, taken, "the given map takes")
    return given


class Allocator:
    """One plan and one set of constraints, maybe with a profile; serves any number of budgets."""

    def __init__(
        self, plan: Plan, allocation: Allocation, profile: SensitivityProfile | None = None
    ) -> None:
        self.plan = plan
        self.allocation = allocation
        self.widths = np.array(allocation.legal_widths, dtype=np.int64)
        self._profile = profile
        self._solvers: dict[Kind, Knapsack] = {}
        self._weights: dict[Kind, IntArray] = {}
        columns = [group_columns(linear.columns) for linear in plan.linears]
        self._starts = np.cumsum([0, *(len(c) for c in columns)])
        self._columns = np.concatenate([np.array(c, dtype=np.int64) for c in columns])
        self._linear = np.repeat(np.arange(len(columns)), np.diff(self._starts))
        blocks = np.array([linear.block for linear in plan.linears])[self._linear]
        self._edge = (blocks == 0) | (blocks == plan.block_count - 1)
        if profile is not None:
            profile.check_shapes(plan.shapes)

    @property
    def profile(self) -> SensitivityProfile:
        """The profile, where the method needs one; raises `SpecError` without it."""
        if self._profile is None:
            raise SpecError(
                f"allocation method {self.allocation.method!r} needs a sensitivity profile",
                param="allocation.method",
            )
        return self._profile

    def uniform(self, budget: Budget) -> BitWidthMap:
        """The largest single width that fits (edge blocks: at least `edge_min_bits`)."""
        return self._map(self._uniform_widths(self._largest(budget, self.widths.tolist())))

    def sba_base(self, budget: Budget) -> int:
        """The base width at which `sba` profiles and allocates: the largest that fits."""
        legal = set(self.widths.tolist())
        bases = [b for b in sorted(legal) if {b - 1, b + 1} <= legal]
        if not bases or self.allocation.per_linear:
            raise SpecError(
                f"sba mixes widths b-1, b and b+1 inside a linear: widths {sorted(legal)} with "
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
        swaps = self._sba_swaps(base)
        order = sorted(swaps, key=lambda i: (swaps[i].gain, i))
        for kept in range(len(order) + 1):
            flat = self._sba_widths(base, {i: swaps[i] for i in order[kept:]})
            if self._fits(flat, budget):
                return self._map(flat)
        return self._map(self._uniform_widths(base))

    def knapsack(self, budget: Budget) -> BitWidthMap:
        """The map of least predicted loss; never worse than a uniform or sba map that fits."""
        kind = budget.kind
        capacity = limit(self.plan, budget)
        if kind == "size":
            best = self._solve_size(capacity, budget)
        else:
            fixed = order_bytes(self.plan, self.allocation.order) if kind == "bits" else 0
            solver = self._solver(kind)
            if solver.minimum > capacity - fixed:
                raise _too_small(self.plan, budget, solver.minimum + fixed)
            best = self._flat(solver.solve(capacity - fixed))
        loss = self.predicted(best)
        for flat in self._simple_maps():
            other = self.predicted(flat)
            if other < loss and self._fits(flat, budget):
                best, loss = flat, other
        return self._map(best)

    def curve(self, points: int) -> list[CurvePoint]:
        """See `curve`."""
        solver = self._solver("bits")
        largest = solver.weight_of(solver.solve(int(solver.weight.max(axis=1).sum())))
        capacities = np.linspace(solver.minimum, largest, points).astype(np.int64)
        return [self.point(self._flat(solver.solve(int(c)))) for c in np.unique(capacities)]

    def point(self, flat: GroupWidths) -> CurvePoint:
        """Size and predicted loss of the widths of all groups."""
        return CurvePoint(
            size=self._measure(flat, "size"),
            bits=float(value(self.plan, "bits", self._measure(flat, "bits"))),
            code_bits=float(value(self.plan, "code_bits", self._measure(flat, "code_bits"))),
            predicted_loss=self.predicted(flat),
        )

    def predicted(self, flat: GroupWidths) -> float:
        """Predicted loss, nats per token, of the widths of all groups."""
        column = np.searchsorted(self.widths, flat)
        return float(self._costs[np.arange(len(flat)), column].sum())

    @cached_property
    def _costs(self) -> FloatArray:
        """Costs of all groups at the legal widths: float64 [sum of G, B]."""
        missing = sorted(set(self.widths.tolist()) - set(self.profile.widths))
        if missing:
            raise SpecError(
                f"widths {missing} are not in the profile, which has "
                f"{list(self.profile.widths)}: leave them out or make a new profile",
                param="allocation.widths",
            )
        take = np.searchsorted(np.array(self.profile.widths), self.widths)
        return np.concatenate(
            [self.profile.linear(linear.name).costs[:, take] for linear in self.plan.linears]
        )

    @cached_property
    def _unit(self) -> IntArray:
        """Unit of every group: int64 [sum of G], numbered in the plan's order."""
        leader = np.arange(len(self.plan.linears))
        if self.allocation.fuse_siblings:
            place = {linear.name: i for i, linear in enumerate(self.plan.linears)}
            for block in range(self.plan.block_count):
                for group in self.plan.input_groups(block):
                    leader[[place[name] for name in group]] = place[group[0]]
        inside = np.arange(len(self._linear)) - self._starts[self._linear]
        if self.allocation.per_linear:
            inside[:] = 0
        names = self._starts[leader[self._linear]] + inside
        return np.unique(names, return_inverse=True)[1].astype(np.int64)

    def _solver(self, kind: Kind) -> Knapsack:
        counted: Kind = "code_bits" if kind == "code_bits" else "bits"
        if counted not in self._solvers:
            self._solvers[counted] = self._build_solver(counted)
        return self._solvers[counted]

    def _build_solver(self, kind: Kind) -> Knapsack:
        count = int(self._unit.max()) + 1
        shape = (count, len(self.widths))
        weight = np.zeros(shape, dtype=np.int64)
        cost, allowed = np.zeros(shape), np.ones(shape, dtype=np.bool_)
        np.add.at(weight, self._unit, self._group_weights(kind))
        np.add.at(cost, self._unit, self._costs)
        np.logical_and.at(allowed, self._unit, self._allowed())
        return Knapsack(weight, cost, allowed)

    def _group_weights(self, kind: Kind) -> IntArray:
        """What every group takes at every legal width: int64 [sum of G, B]."""
        if kind not in self._weights:
            rows = np.array([linear.rows for linear in self.plan.linears])[self._linear]
            pairs = list(zip(rows.tolist(), self._columns.tolist(), strict=True))
            known = {
                pair: [group_weight(kind, *pair, width) for width in self.widths.tolist()]
                for pair in set(pairs)
            }
            self._weights[kind] = np.array([known[pair] for pair in pairs], dtype=np.int64)
        return self._weights[kind]

    def _allowed(self) -> BoolArray:
        """Which widths a group may have: bool [sum of G, B]."""
        floor = np.where(self._edge, self.allocation.edge_min_bits or 0, 0)
        return self.widths[None, :] >= floor[:, None]

    def _solve_size(self, capacity: int, budget: Budget) -> GroupWidths:
        solver = self._solver("size")
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
            smallest = min(self._measure(flat, "size"), self._measure(self._lowest(), "size"))
            raise _too_small(self.plan, budget, smallest)
        return flat

    @cached_property
    def _smallest_rest(self) -> int:
        """Bytes of the checkpoint besides groups, as few as they can be.

        A header is shortest with the fewest planes and the smallest offsets.
        """
        plain = [b for b in self.widths.tolist() if len(PLANES[b]) == 1]
        rest = []
        for width in {int(self.widths[0]), *plain[:1]}:
            flat = self._uniform_widths(width)
            rest.append(self._measure(flat, "size") - self._measure(flat, "bits"))
        tensors = len(self.plan.tensors) + 5 * len(self.plan.linears)
        slack = HEADER_SLACK_PER_TENSOR * tensors
        return min(rest) + order_bytes(self.plan, self.allocation.order) - slack

    def _simple_maps(self) -> Iterator[GroupWidths]:
        """Uniform and sba maps of every base width that the constraints allow."""
        for width in self.widths.tolist():
            yield self._uniform_widths(width)
        if self.allocation.per_linear:
            return
        for base in self.profile.sba:
            if {base - 1, base, base + 1} <= set(self.widths.tolist()):
                yield self._sba_widths(base, self._sba_swaps(base))

    def _uniform_widths(self, width: int) -> GroupWidths:
        flat = np.full(len(self._linear), width, dtype=np.int64)
        return self._raise_edges(flat)

    def _raise_edges(self, flat: GroupWidths) -> GroupWidths:
        floor = self.widths[np.searchsorted(self.widths, self.allocation.edge_min_bits or 0)]
        return np.where(self._edge, np.maximum(flat, floor), flat)

    def _lowest(self) -> GroupWidths:
        return self._uniform_widths(int(self.widths[0]))

    def _largest(self, budget: Budget, candidates: list[int]) -> int:
        for width in reversed(candidates):
            if self._fits(self._uniform_widths(width), budget):
                return width
        lowest = self._uniform_widths(candidates[0])
        raise _too_small(self.plan, budget, self._measure(lowest, budget.kind))

    def _sba_swaps(self, base: int) -> dict[int, Swap]:
        """Linears (by place in the plan) whose recorded KL falls with p > 0, fused or alone."""
        records = self.profile.sba.get(base)
        if records is None:
            raise SpecError(
                f"the profile has no sba records at base width {base}; it has "
                f"{sorted(self.profile.sba)}: make a new profile",
                param="allocation.method",
            )
        place = {linear.name: i for i, linear in enumerate(self.plan.linears)}
        swaps: dict[int, Swap] = {}
        for group in self._sba_groups():
            kl = np.sum([records[name].kl for name in group], axis=0)
            rank = np.sum([np.argsort(records[name].salience) for name in group], axis=0)
            count = int(np.argmin(kl))
            if count:
                swap = Swap(np.argsort(rank, kind="stable"), count, float(kl[0] - kl[count]))
                swaps |= {place[name]: swap for name in group}
        return swaps

    def _sba_groups(self) -> Iterator[list[str]]:
        for block in range(self.plan.block_count):
            for group in self.plan.input_groups(block):
                yield from [group] if self.allocation.fuse_siblings else [[n] for n in group]

    def _sba_widths(self, base: int, swaps: dict[int, Swap]) -> GroupWidths:
        flat = np.full(len(self._linear), base, dtype=np.int64)
        for place, swap in swaps.items():
            start = int(self._starts[place])
            flat[start + swap.salience[: swap.count]] = base - 1
            flat[start + swap.salience[-swap.count :]] = base + 1
        return self._raise_edges(flat)

    def _flat(self, choice: IntArray) -> GroupWidths:
        return self.widths[choice][self._unit]

    def _dict(self, flat: GroupWidths) -> dict[str, tuple[int, ...]]:
        values = flat.tolist()
        return {
            linear.name: tuple(values[start:end])
            for linear, start, end in zip(
                self.plan.linears,
                self._starts[:-1].tolist(),
                self._starts[1:].tolist(),
                strict=True,
            )
        }

    def _map(self, flat: GroupWidths) -> BitWidthMap:
        return BitWidthMap(order=self.allocation.order, linears=self._dict(flat))

    def _measure(self, flat: GroupWidths, kind: Kind) -> int:
        """`budget.measure` of the widths of all groups."""
        if kind == "size":
            return measure(self.plan, self._dict(flat), self.allocation.order, kind)
        column = np.searchsorted(self.widths, flat)
        groups = int(self._group_weights(kind)[np.arange(len(flat)), column].sum())
        return groups + (order_bytes(self.plan, self.allocation.order) if kind == "bits" else 0)

    def _fits(self, flat: GroupWidths, budget: Budget) -> bool:
        return self._measure(flat, budget.kind) <= limit(self.plan, budget)


@dataclass(frozen=True)
class Swap:
    """`count` least salient groups lose a bit, as many most salient win one.

    salience: int64 [G_full], ascending. gain: by how much the recorded output KL falls.
    """

    salience: IntArray
    count: int
    gain: float


def _too_small(plan: Plan, budget: Budget, smallest: int, what: str = "") -> BudgetError:
    needed = describe(plan, budget.kind, smallest)
    given = f"{budget.value:,} bytes" if budget.kind == "size" else f"{budget.value}"
    reason = f"{what} {needed}" if what else f"the smallest that fits the constraints is {needed}"
    return BudgetError(
        f"budget {budget.kind} = {given} cannot be met: {reason}; raise the budget or allow "
        "smaller widths",
        param=f"budget.{budget.kind}",
    )
