"""Multiple-choice knapsack on plain arrays: one choice for each unit, one capacity. Torch-free.

    minimize sum_u cost[u, c_u]   subject to   sum_u weight[u, c_u] <= capacity

Each unit's choices are pruned to the lower convex hull of (weight, cost), whose edges have falling
efficiency -dcost/dweight. All edges of all units, sorted by efficiency, are then taken in turn:
a prefix of that list is the optimum of the Lagrangian at the multiplier where it ends (so no
bisection is needed: every multiplier is a position in the list), and the edges after it fill what
is left, skipping the ones that do not fit. A small problem is solved exactly instead, by its whole
Pareto frontier.

Both ways more capacity never gives a larger cost. For the greedy one: let a larger capacity take
an edge first that the smaller one had to skip. Whatever the smaller one takes later has no better
efficiency and altogether less weight than that edge.

Given up: above the frontier's limit the result may miss the optimum by less than the cost of one
edge (`gap` bounds it); choices off the hull are not used to fill the last bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

FRONTIER_UNITS = 32
FRONTIER_POINTS = 4096


@dataclass(frozen=True)
class Edges:
    """Steps along the hulls of all units, by falling efficiency.

    unit, step, target: int64 [E]; taking an edge moves `unit` from its vertex number `step` to
    choice `target`. weight: int64 [E] > 0 and gain: float64 [E] > 0 are what it adds and saves.
    total: int64 [E + 1], weight of every prefix.
    """

    unit: IntArray
    step: IntArray
    target: IntArray
    weight: IntArray
    gain: FloatArray
    total: IntArray


class Knapsack:
    """A knapsack prepared once and solved for any number of capacities.

    weight: int64 [U, B] >= 0. cost: float64 [U, B], finite where allowed. allowed: bool [U, B],
    at least one per unit.
    """

    def __init__(self, weight: IntArray, cost: FloatArray, allowed: BoolArray) -> None:
        if not allowed.any(axis=1).all():
            raise ValueError("every unit needs at least one allowed choice")
        if not np.isfinite(cost[allowed]).all():
            raise ValueError("costs of allowed choices must be finite")
        self.weight = weight
        self.cost = cost
        self._rows = np.arange(len(weight))
        self.smallest = _smallest_choice(weight, cost, allowed)
        self.edges = _hull_edges(weight, cost, allowed, self.smallest)
        self._frontier = _frontier(weight, cost, allowed)

    def weight_of(self, choice: IntArray) -> int:
        """Total weight of choices int64 [U]."""
        return int(self.weight[self._rows, choice].sum())

    def cost_of(self, choice: IntArray) -> float:
        """Total cost of choices int64 [U]."""
        return float(self.cost[self._rows, choice].sum())

    @property
    def minimum(self) -> int:
        """The smallest capacity that has a solution."""
        return self.weight_of(self.smallest)

    def solve(self, capacity: int) -> IntArray:
        """Choices int64 [U] of total weight at most `capacity`.

        Raises ValueError where `capacity` is below `minimum`.
        """
        if capacity < self.minimum:
            raise ValueError(f"capacity {capacity} is below the minimum {self.minimum}")
        if self._frontier is not None:
            return self._frontier.best(capacity)
        return self._greedy(capacity)

    def gap(self, capacity: int) -> float:
        """Upper bound of how far `solve` can be from the optimum, in units of cost."""
        if self._frontier is not None:
            return 0.0
        left = capacity - self.minimum
        taken = int(np.searchsorted(self.edges.total, left, side="right")) - 1
        if taken == len(self.edges.gain):
            return 0.0
        share = (left - self.edges.total[taken]) / self.edges.weight[taken]
        bound = self.cost_of(self.smallest) - self.edges.gain[:taken].sum()
        bound -= share * self.edges.gain[taken]
        return max(0.0, self.cost_of(self.solve(capacity)) - float(bound))

    def _greedy(self, capacity: int) -> IntArray:
        edges = self.edges
        choice: IntArray = self.smallest.copy()
        left = capacity - self.minimum
        start = int(np.searchsorted(edges.total, left, side="right")) - 1
        left -= int(edges.total[start])
        choice[edges.unit[:start]] = edges.target[:start]
        level = np.bincount(edges.unit[:start], minlength=len(choice))
        while left > 0:
            fits = (edges.weight[start:] <= left) & (
                edges.step[start:] == level[edges.unit[start:]]
            )
            first = int(fits.argmax()) if fits.any() else -1
            if first < 0:
                break
            start += first
            unit = edges.unit[start]
            choice[unit] = edges.target[start]
            level[unit] += 1
            left -= int(edges.weight[start])
            start += 1
        return choice


def _smallest_choice(weight: IntArray, cost: FloatArray, allowed: BoolArray) -> IntArray:
    """The lightest allowed choice of every unit, the cheapest of equals: int64 [U]."""
    lightest = np.where(allowed, weight, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    tied = allowed & (weight == lightest)
    cheapest: IntArray = np.where(tied, cost, np.inf).argmin(axis=1).astype(np.int64)
    return cheapest


def _hull_edges(weight: IntArray, cost: FloatArray, allowed: BoolArray, start: IntArray) -> Edges:
    """Walk all hulls at once: from every vertex to the choice of best efficiency beyond it."""
    rows = np.arange(len(weight))
    at = start.copy()
    steep = np.full(len(weight), np.inf)
    parts: list[tuple[npt.NDArray[np.generic], ...]] = []
    for step in range(weight.shape[1] - 1):
        added = weight - weight[rows, at][:, None]
        saved = cost[rows, at][:, None] - np.where(allowed, cost, np.inf)
        rate = np.where((added > 0) & (saved > 0), saved / np.maximum(added, 1), -np.inf)
        best = rate.max(axis=1)
        live = np.isfinite(best)
        if not live.any():
            break
        target = np.where(rate == best[:, None], added, -1).argmax(axis=1)
        steep = np.minimum(steep, np.where(live, best, steep))
        unit = rows[live]
        moved = target[live]
        parts.append(
            (
                unit,
                np.full(len(unit), step),
                moved,
                added[unit, moved],
                saved[unit, moved],
                steep[live],
            )
        )
        at = np.where(live, target, at)
    return _sorted_edges(parts)


def _sorted_edges(parts: list[tuple[npt.NDArray[np.generic], ...]]) -> Edges:
    """Edges by falling efficiency; ties by unit, then by step, so that the order is total."""
    if not parts:
        none = np.zeros(0, dtype=np.int64)
        return Edges(none, none, none, none, np.zeros(0), np.zeros(1, dtype=np.int64))
    unit, step, target, weight, gain, rate = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    order = np.lexsort((step, unit, -rate.astype(np.float64)))
    weight = weight[order].astype(np.int64)
    return Edges(
        unit=unit[order].astype(np.int64),
        step=step[order].astype(np.int64),
        target=target[order].astype(np.int64),
        weight=weight,
        gain=gain[order].astype(np.float64),
        total=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(weight)]),
    )


@dataclass(frozen=True)
class _Frontier:
    """All Pareto-optimal totals of a small problem, with the way back to their choices.

    weight: int64 [P] ascending, cost: float64 [P] descending; back[u]: (point of the frontier
    without units u.., choice of unit u), int64 [P_u] each.
    """

    weight: IntArray
    cost: FloatArray
    back: list[tuple[IntArray, IntArray]]

    def best(self, capacity: int) -> IntArray:
        point = int(np.searchsorted(self.weight, capacity, side="right")) - 1
        choice = np.zeros(len(self.back), dtype=np.int64)
        for unit in reversed(range(len(self.back))):
            origin, chosen = self.back[unit]
            choice[unit] = chosen[point]
            point = int(origin[point])
        return choice


def _frontier(weight: IntArray, cost: FloatArray, allowed: BoolArray) -> _Frontier | None:
    """The exact frontier, or None where the problem is too large for it."""
    if len(weight) > FRONTIER_UNITS:
        return None
    total = np.zeros(1, dtype=np.int64)
    loss = np.zeros(1)
    back: list[tuple[IntArray, IntArray]] = []
    for unit in range(len(weight)):
        legal = np.flatnonzero(allowed[unit])
        sums = (total[:, None] + weight[unit, legal]).ravel()
        losses = (loss[:, None] + cost[unit, legal]).ravel()
        order = np.lexsort((losses, sums))
        before = np.minimum.accumulate(np.concatenate([[np.inf], losses[order][:-1]]))
        kept = order[losses[order] < before]
        if len(kept) > FRONTIER_POINTS:
            return None
        back.append((kept // len(legal), legal[kept % len(legal)]))
        total, loss = sums[kept], losses[kept]
    return _Frontier(total, loss, back)
