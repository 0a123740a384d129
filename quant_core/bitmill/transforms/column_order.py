"""Column orders, and their folding into the linears before: the same function without a gather.

    down_proj reads h = act(gate_proj x) * (up_proj x), element by element. With P the order of its
    columns, down_proj P^T reads P h: the rows of gate_proj and up_proj change places instead.

Packing does this where `Plan.feeders` says that it is exact. Every sum keeps its terms and their
sequence, so the outputs stay the same bit for bit wherever a kernel computes all rows alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.plan.model_plan import Plan
from bitmill.quant.rewrites import ColumnOrder, Rewrite, Rewrites
from bitmill.quant.tensors import Stored
from bitmill.runtime.ranks import Ranks
from bitmill.transforms.transform import SolvedModel


@dataclass(frozen=True, eq=False)
class ColumnOrders:
    """Orders that were measured before (stage `profile`): full name of a linear -> i64 [K]; linears
    that read one input share one order."""

    orders: Mapping[str, Tensor]

    def fit(
        self, weights: Mapping[str, Tensor], H: Tensor | None, ranks: Ranks
    ) -> Mapping[str, Rewrite]:
        """One order for all, that of the first; none where it has none."""
        first, W = next(iter(weights.items()))
        if first not in self.orders:
            return {}
        order = ColumnOrder(self.orders[first].to(W.device, torch.int32, non_blocking=True))
        return dict.fromkeys(weights, order)


class FoldedOrders:
    """A solved model with the orders of `Plan.feeders` in the rows of the linears before."""

    def __init__(self, model: SolvedModel, plan: Plan) -> None:
        self._model, self._feeders = model, plan.feeders
        self._reader = {name: reader for reader, names in plan.feeders.items() for name in names}

    def packed(self, name: str) -> Stored:
        """One linear or embedding as it is packed."""
        packed, rows = self._model.packed(name), self.rows(name)
        if name in self._feeders:
            packed = packed.rewritten(_without_order(packed.rewrites))
        return packed if rows is None else packed.with_rows(rows)

    def solved(self, name: str, packed: Stored) -> Stored:
        """The rows of a packed linear where they were when it was solved."""
        rows = self.rows(name)
        return self._model.solved(
            name, packed if rows is None else packed.with_rows(torch.argsort(rows))
        )

    def rewrites(self, name: str) -> Rewrites:
        """What is left of a linear's rewrites."""
        rewrites = self._model.rewrites(name)
        return _without_order(rewrites) if name in self._feeders else rewrites

    def rows(self, name: str) -> Tensor | None:
        """i64 [N]: packed row n is the solved linear's row rows[n]; None where none moved."""
        if name not in self._reader:
            return None
        order = self._model.rewrites(self._reader[name]).order
        return None if order is None else order.long()


def _without_order(rewrites: Rewrites) -> Rewrites:
    return Rewrites(one for one in rewrites if not isinstance(one, ColumnOrder))
