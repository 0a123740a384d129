"""Column orders folded into the linears before: the same function without a gather.

    down_proj reads h = act(gate_proj x) * (up_proj x), element by element. With P the order of its
    columns, down_proj P^T reads P h: the rows of gate_proj and up_proj change places instead.

Packing does this where `Plan.feeders` says that it is exact. Every sum keeps its terms and their
sequence, so the outputs stay the same bit for bit wherever a kernel computes all rows alike.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from bitmill.packed import QuantizedWeight
from bitmill.plan import Plan
from bitmill.refinement import RefinedModel


class FoldedModel:
    """A refined model as it is packed."""

    def __init__(self, refined: RefinedModel, plan: Plan) -> None:
        self._refined, self._feeders = refined, plan.feeders
        self._reader = {name: reader for reader, names in plan.feeders.items() for name in names}

    def linear(self, name: str) -> QuantizedWeight:
        """One linear or embedding as it is packed."""
        weight = self._refined.linear(name)
        if name in self._feeders:
            return replace(weight, order=None)
        rows = self.rows(name)
        if rows is None:
            return weight
        return replace(
            weight,
            codes=weight.codes[rows],
            scales=weight.scales[:, rows],
            zeros=weight.zeros[:, rows],
        )

    def rows(self, name: str) -> Tensor | None:
        """i64 [N]: packed row n is the refined linear's row rows[n]; None where none moved."""
        order = self._refined.order(self._reader[name]) if name in self._reader else None
        return None if order is None else order.long()
