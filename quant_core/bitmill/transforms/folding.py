"""Column orders folded into the linears before: the same function without a gather.

    down_proj reads h = act(gate_proj x) * (up_proj x), element by element. With P the order of its
    columns, down_proj P^T reads P h: the rows of gate_proj and up_proj change places instead.

Packing does this where `Plan.feeders` says that it is exact. Every sum keeps its terms and their
sequence, so the outputs stay the same bit for bit wherever a kernel computes all rows alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import Tensor

from bitmill.plan.model_plan import Plan
from bitmill.quant.tensors import PackedTensor


class Solved(Protocol):
    """A model whose linears are solved, as far as folding reads it."""

    def packed(self, name: str) -> PackedTensor:
        """One linear or embedding, its columns in packed order."""

    def order(self, name: str) -> Tensor | None:
        """Column order i32 [K] of a linear, None where it is natural."""


class FoldedModel:
    """A refined model as it is packed."""

    def __init__(self, refined: Solved, plan: Plan) -> None:
        self._refined, self._feeders = refined, plan.feeders
        self._reader = {name: reader for reader, names in plan.feeders.items() for name in names}

    def linear(self, name: str) -> PackedTensor:
        """One linear or embedding as it is packed."""
        packed = self._refined.packed(name)
        if name in self._feeders:
            return replace(packed, order=None)
        rows = self.rows(name)
        return packed if rows is None else packed.with_rows(rows)

    def rows(self, name: str) -> Tensor | None:
        """i64 [N]: packed row n is the refined linear's row rows[n]; None where none moved."""
        order = self._refined.order(self._reader[name]) if name in self._reader else None
        return None if order is None else order.long()
