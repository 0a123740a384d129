"""All groups of all linears of a plan in one row, as the allocator sees them. Torch-free.

Arrays run over the groups of the first linear, then those of the second, in the plan's order,
embeddings last; T is their number. Groups that must have the same width form one unit: the same
group of fused siblings, or all groups of a linear where it needs one width, as an embedding always
does. Those have one of the widths of affine codes, whatever code the linears are in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from bitmill.allocation.knapsack import BoolArray, IntArray
from bitmill.config.bit_width_map import NO_OUTLIERS, group_columns
from bitmill.config.codes import embedding_width
from bitmill.config.quantization import FILE_KINDS, Allocation, Kind
from bitmill.formats.accounting import fixed, group_weight, measure
from bitmill.plan.model_plan import Plan

GroupWidths = npt.NDArray[np.int64]
"""Width of every group: int64 [T]."""


class GroupTable:
    """The groups of one plan under one set of constraints.

    outliers: columns kept in 16 bits, of the linears that have some.
    widths: int64 [B], the legal ones, ascending. unit: int64 [T], numbered in the plan's order.
    allowed: bool [T, B], which widths a group may have.
    """

    def __init__(
        self, plan: Plan, allocation: Allocation, outliers: Mapping[str, int] = NO_OUTLIERS
    ) -> None:
        self.plan, self.allocation, self.outliers = plan, allocation, outliers
        self.widths = np.array(allocation.legal_widths, dtype=np.int64)
        columns = [group_columns(linear.columns) for linear in plan.matrices]
        self.starts = np.cumsum([0, *(len(c) for c in columns)])
        self._columns = np.concatenate([np.array(c, dtype=np.int64) for c in columns])
        self._linear = np.repeat(np.arange(len(columns)), np.diff(self.starts))
        blocks = np.array([linear.block for linear in plan.matrices])[self._linear]
        self._edge = (blocks == 0) | (blocks == plan.block_count - 1)
        self._embedding = np.array([one.embedding for one in plan.matrices])[self._linear]
        legal = self.widths.tolist()
        self._of_embeddings = np.array(
            [embedding_width(width, legal) for width in legal] if plan.embeddings else legal
        )
        self.unit = self._units()
        self.allowed: BoolArray = self.widths >= np.where(self._edge, self._floor, 0)[:, None]
        self.allowed[self._embedding] &= self._of_embeddings == self.widths
        self._weights: dict[Kind, IntArray] = {}

    def __len__(self) -> int:
        return len(self._linear)

    @property
    def _floor(self) -> int:
        """The smallest legal width of edge blocks."""
        return int(self.widths[np.searchsorted(self.widths, self.allocation.edge_min_bits or 0)])

    def _units(self) -> IntArray:
        leader = np.arange(len(self.plan.matrices))
        if self.allocation.fuse_siblings:
            place = self.places()
            for names in self.siblings():
                leader[[place[name] for name in names]] = place[names[0]]
        inside = np.arange(len(self)) - self.starts[self._linear]
        if self.allocation.per_linear:
            inside[:] = 0
        inside[self._linear >= len(self.plan.linears)] = 0
        names = self.starts[leader[self._linear]] + inside
        return np.unique(names, return_inverse=True)[1].astype(np.int64)

    def places(self) -> dict[str, int]:
        """Linear -> its place in the plan."""
        return {linear.name: i for i, linear in enumerate(self.plan.matrices)}

    def siblings(self) -> Iterator[list[str]]:
        """Names that read the same input where siblings are fused, else single names."""
        for block in range(self.plan.block_count):
            for names in self.plan.siblings(block):
                yield from [names] if self.allocation.fuse_siblings else [[n] for n in names]

    def uniform(self, width: int) -> GroupWidths:
        """One width everywhere, as far as it is allowed."""
        return self.allowing(np.full(len(self), width, dtype=np.int64))

    def allowing(self, flat: GroupWidths) -> GroupWidths:
        """The widths with those of the edge blocks raised to their floor, and those of embeddings
        changed to the nearest that they may have (`config.codes.embedding_width`)."""
        raised = np.where(self._edge, np.maximum(flat, self._floor), flat)
        return np.where(self._embedding, self._of_embeddings[self.column(raised)], raised)

    def column(self, flat: GroupWidths) -> IntArray:
        """Place of each group's width among the legal ones, int64 [T]."""
        return np.searchsorted(self.widths, flat).astype(np.int64)

    def weights(self, kind: Kind) -> IntArray:
        """What every group takes at every legal width: int64 [T, B], code bits or bytes."""
        if kind not in self._weights:
            rows = np.array([linear.rows for linear in self.plan.matrices])[self._linear]
            columns, embedding = self._columns.tolist(), self._embedding.tolist()
            sizes = list(zip(rows.tolist(), columns, embedding, strict=True))
            known = {
                (N, c, e): [
                    group_weight(self.plan, kind, N, c, width, embedding=e)
                    for width in self.widths.tolist()
                ]
                for N, c, e in set(sizes)
            }
            self._weights[kind] = np.array([known[size] for size in sizes], dtype=np.int64)
        return self._weights[kind]

    def named(self, flat: GroupWidths) -> dict[str, tuple[int, ...]]:
        """Linear -> widths of its groups."""
        values, starts = flat.tolist(), self.starts.tolist()
        return {
            linear.name: tuple(values[starts[i] : starts[i + 1]])
            for i, linear in enumerate(self.plan.matrices)
        }

    def measure(self, flat: GroupWidths, kind: Kind) -> int:
        """`budget.measure` of these widths."""
        order = self.allocation.order
        if kind in FILE_KINDS:
            return measure(self.plan, self.named(flat), order, kind, self.outliers)
        groups = int(self.weights(kind)[np.arange(len(flat)), self.column(flat)].sum())
        return groups + self.fixed(kind)

    def fixed(self, kind: Kind) -> int:
        """What of `measure` no width changes: code bits of outliers, or stored bytes."""
        return fixed(self.plan, self.allocation.order, kind, self.outliers)
