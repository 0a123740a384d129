"""SliM-LLM's allocation from recorded salience and output KL. Torch-free.

    p = argmin of the linear's KL record; the p least salient full groups get b - 1 bits, the p most
    salient b + 1, all others b (arXiv 2405.14917, section 3.2)

Fused siblings share one p and one ranking: their KL is summed and their ranks are added. Balanced
in columns: only full groups are swapped, so the code bits are exactly b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bitmill.allocation.groups import GroupTable, GroupWidths
from bitmill.allocation.knapsack import IntArray
from bitmill.allocation.profile import SensitivityProfile
from bitmill.errors import SpecError


@dataclass(frozen=True)
class Swap:
    """`count` least salient groups lose a bit, as many most salient win one.

    salience: int64 [G_full], ascending. gain: by how much the recorded output KL falls.
    """

    salience: IntArray
    count: int
    gain: float


def sba_swaps(groups: GroupTable, profile: SensitivityProfile, base: int) -> dict[int, Swap]:
    """Linears, by place in the plan, whose recorded KL is least at some p > 0.

    Raises `SpecError` where the profile has no records at this base width.
    """
    records = profile.sba.get(base)
    if records is None:
        raise SpecError(
            f"the profile has no sba records at base width {base}; it has "
            f"{sorted(profile.sba)}: make a new profile",
            param="allocation.method",
        )
    place = groups.places()
    swaps: dict[int, Swap] = {}
    for names in groups.siblings():
        kl = np.sum([records[name].kl for name in names], axis=0)
        rank = np.sum([np.argsort(records[name].salience) for name in names], axis=0)
        count = int(np.argmin(kl))
        if count:
            swap = Swap(np.argsort(rank, kind="stable"), count, float(kl[0] - kl[count]))
            swaps |= {place[name]: swap for name in names}
    return swaps


def sba_widths(groups: GroupTable, base: int, swaps: Mapping[int, Swap]) -> GroupWidths:
    """Widths of all groups with these swaps made."""
    flat = np.full(len(groups), base, dtype=np.int64)
    for place, swap in swaps.items():
        start = int(groups.starts[place])
        flat[start + swap.salience[: swap.count]] = base - 1
        flat[start + swap.salience[-swap.count :]] = base + 1
    return groups.allowing(flat)
