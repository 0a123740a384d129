"""Column orders folded into the linears before: the same function without a gather.

    down_proj reads h = act(gate_proj x) * (up_proj x), element by element. With P the order of its
    columns, down_proj P^T reads P h: the rows of gate_proj and up_proj change places instead.

Packing does this where `Plan.feeders` says that it is exact. Every sum keeps its terms and their
sequence, so the outputs stay the same bit for bit wherever a kernel computes all rows alike.
"""

from __future__ import annotations

from dataclasses import replace

from bitmill.packed import QuantizedWeight
from bitmill.plan import Plan
from bitmill.refinement import RefinedModel


class FoldedModel:
    """A refined model as it is packed."""

    def __init__(self, refined: RefinedModel, plan: Plan) -> None:
        self._refined, self._feeders = refined, plan.feeders
        self._reader = {name: reader for reader, names in plan.feeders.items() for name in names}

    def linear(self, name: str) -> QuantizedWeight:
        """One linear or embedding: rows in the order of the linear it feeds, if that has one."""
        weight = self._refined.linear(name)
        if name in self._feeders:
            return replace(weight, order=None)
        order = self._refined.order(self._reader[name]) if name in self._reader else None
        if order is None:
            return weight
        rows = order.long()
        return replace(
            weight,
            codes=weight.codes[rows],
            scales=weight.scales[:, rows],
            zeros=weight.zeros[:, rows],
        )

    def code_hashes(self) -> dict[str, str]:
        """SHA-256 of the codes u8 [N, K] of every linear and embedding."""
        moved = {name: self.linear(name).codes_sha256() for name in self._reader}
        return self._refined.code_hashes() | moved
