"""How many columns of each linear stay in 16 bits: candidates for the allocator. Torch-free.

Given a price of a byte, every linear has a best number of its own, that of the least

    sum_g min_b (cost[k, g, b] + price * bytes[g, b]) + price * bytes of k outlier columns

Widths are then found anew by the knapsack for each distinct choice (`allocator.py`), within the
budget to the byte, so prices need only come near the right one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from bitmill.allocation.groups import GroupTable
from bitmill.allocation.knapsack import BoolArray, FloatArray, IntArray
from bitmill.allocation.profile import SensitivityProfile
from bitmill.config.bit_width_map import outlier_bytes
from bitmill.errors import SpecError

PRICES = 24


def prices(gain: FloatArray, weight: IntArray) -> FloatArray:
    """Nats a token of a byte at even steps through the edges of a knapsack, highest first."""
    places = np.linspace(0, len(gain) - 1, PRICES).astype(np.int64)
    found: FloatArray = (gain / weight)[np.unique(places)] if len(gain) else np.zeros(0)
    return found


def outlier_choices(
    groups: GroupTable, profile: SensitivityProfile, at: Iterable[float]
) -> list[dict[str, int]]:
    """Numbers of outlier columns by linear, each choice once, for prices `at`.

    Raises `SpecError` for numbers that the profile has no costs of.
    """
    asked = groups.allocation.outliers
    missing = sorted(set(asked) - set(profile.outliers))
    if missing:
        raise SpecError(
            f"outliers {missing} are not in the profile, which has {list(profile.outliers)}: "
            "leave them out or make a new profile",
            param="allocation.outliers",
        )
    linears = groups.plan.linears
    allowed = groups.allowed[: groups.starts[len(linears)]]
    width = np.searchsorted(np.array(profile.widths), groups.widths)
    weight = groups.weights("bits")[: len(allowed)]
    counts = (0, *asked)
    costs = [
        np.concatenate([_costs(profile, one.name, count)[:, width] for one in linears])
        for count in counts
    ]
    kept = np.array([[outlier_bytes(one.rows, count) for one in linears] for count in counts])
    fits = np.array([[count < one.columns for one in linears] for count in counts])
    found: list[dict[str, int]] = []
    for price in at:
        totals = [_totals(cost + price * weight, allowed, groups) for cost in costs]
        best = np.where(fits, np.stack(totals) + price * kept, np.inf).argmin(axis=0)
        choice = {
            one.name: counts[k] for one, k in zip(linears, best.tolist(), strict=True) if counts[k]
        }
        if choice and choice not in found:
            found.append(choice)
    return found


def _costs(profile: SensitivityProfile, name: str, count: int) -> FloatArray:
    linear = profile.linear(name)
    costs: FloatArray = linear.kept[profile.outliers.index(count)] if count else linear.costs
    return costs


def _totals(values: FloatArray, allowed: BoolArray, groups: GroupTable) -> FloatArray:
    """Sums over each linear's groups of the least value [T, B] that is allowed, float64 [L]."""
    least = np.where(allowed, values, np.inf).min(axis=1)
    totals: FloatArray = np.add.reduceat(least, groups.starts[: len(groups.plan.linears)])
    return totals
