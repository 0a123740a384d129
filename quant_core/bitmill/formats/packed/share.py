"""The share of one packed linear that a rank of a tensor-parallel engine holds.

A rank holds some rows of a linear (its outputs are split) or some of its groups (its inputs are
split, and the ranks' products added), never both. Groups are cut in packed column order, so where
the linear has an order, a share of them reads arbitrary input columns: those that `reads` names.

Tensors are cut while they are read, one at a time, so a rank never holds the whole linear. This
module knows no engine: which rows and groups a rank holds is what the engine's adapter says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bitmill.errors import FormatError
from bitmill.formats.packed.config import PackedLinear
from bitmill.quant.rewrites import check_order
from bitmill.quant.rotation import packed_rewrites
from bitmill.quant.tensors import KINDS, Stored, packed_shapes
from bitmill.quant.trellis import trellis_shapes
from bitmill_kernels.layout import GROUP_SIZE, group_columns, kept_groups
from bitmill_kernels.pack import pack_zeros, unpack_zeros
from bitmill_kernels.trellis.layout import TILE

SHAPES = {"affine": packed_shapes, "trellis": trellis_shapes}
Range = tuple[int, int]
"""[begin, end)."""


def even_groups(rank: int, ranks: int, count: int) -> Range:
    """This rank's groups of `count`, split as evenly as whole groups allow."""
    return count * rank // ranks, count * (rank + 1) // ranks


def aligned_groups(rank: int, ranks: int, K: int) -> Range | None:
    """The groups that lie in this rank's 1/ranks of K columns; None where they do not align."""
    if K % (ranks * GROUP_SIZE):
        return None
    return even_groups(rank, ranks, K // GROUP_SIZE)


class Share:
    """Rows, given as ranges, and groups, given as one range, of a linear [N, K].

    stored: dtype and shape of every tensor that the checkpoint holds of the linear, but its bias
    local:  the same of what this share keeps of each; an order is kept whole. A tensor of which it
            keeps nothing is absent
    tensors: what was kept, by name. An engine may put empty tensors of `local` there beforehand,
            on a device; they are filled then

    Raises FormatError where the widths do not fit K, where trellis codes would be cut inside a row
    of tiles, and where no group is left.
    """

    def __init__(
        self,
        linear: PackedLinear,
        N: int,
        K: int,
        rows: Sequence[Range] = (),
        groups: Range | None = None,
    ) -> None:
        self.linear, self.code, self.N, self.K = linear, linear.code, N, K
        self.rows = tuple(rows) or ((0, N),)
        self.groups = groups or (0, len(linear.widths))
        self.all_rows = self.rows == ((0, N),)
        self.all_groups = self.groups == (0, len(linear.widths))
        columns = group_columns(K)
        if len(columns) != len(linear.widths):
            raise self._refusal(f"has {len(linear.widths)} widths for {K} columns")
        if linear.outliers:
            raise self._refusal(
                f"keeps {linear.outliers} outlier columns in 16 bits, which engines have no place "
                "for yet: quantize without allocation.outliers"
            )
        if self.groups[0] >= self.groups[1]:
            raise self._refusal(
                f"has {len(columns)} groups, too few to give every rank one: use fewer ranks"
            )
        self._check_rows()
        self.widths = linear.widths[slice(*self.groups)]
        first = sum(columns[: self.groups[0]])
        self.columns = (first, first + sum(columns[slice(*self.groups)]))
        self.local_N = sum(end - begin for begin, end in self.rows)
        self.local_K = self.columns[1] - self.columns[0]
        self.stored = self._shapes(N, K, linear.widths)
        self.local = self._shapes(self.local_N, self.local_K, self.widths)
        self.tensors: dict[str, Tensor] = {}
        self._missing = set(self.stored)

    def load(self, name: str, stored: Tensor) -> None:
        """Check one tensor of the checkpoint and keep this share's part of it.

        name: behind the linear's. Raises FormatError naming a tensor that is superfluous, of
        another dtype or shape, or comes twice.
        """
        where = f"{self.linear.name}.{name}"
        if name not in self.stored:
            raise FormatError(f"tensor {where} is superfluous", param=where)
        dtype, shape = self.stored[name]
        if tuple(stored.shape) != shape or stored.dtype != dtype:
            raise FormatError(
                f"tensor {where} is {stored.dtype} of shape {tuple(stored.shape)}: "
                f"expected {dtype} of shape {shape}",
                param=where,
            )
        if name not in self._missing:
            raise FormatError(f"tensor {where} came twice", param=where)
        if name == "order":
            check_order(stored, self.K, where)
        self._missing.remove(name)
        if name not in self.local:
            return
        mine = self._cut(name, stored)
        if name in self.tensors:
            self.tensors[name].copy_(mine)
        else:
            self.tensors[name] = mine.contiguous()

    def weight(self, order: Tensor | None) -> Stored:
        """What this share multiplies with, checked in full.

        order: the linear's, i32 [K], whichever linear owns it. A share of the groups reads the
        columns that `reads` gives, and has no order itself.
        Raises FormatError where a tensor never came or holds illegal values.
        """
        if self._missing:
            names = [f"{self.linear.name}.{name}" for name in sorted(self._missing)]
            raise FormatError(f"the checkpoint lacks {', '.join(names)}", param=names[0])
        name = self.linear.name
        tensors = {f"{name}.{key}": t for key, t in self.tensors.items() if key != "order"}
        rewrites = packed_rewrites(self.code, order if self.all_groups else None, self.columns[0])
        return KINDS[self.code].from_tensors(
            name, tensors, self.local_N, self.local_K, self.widths, rewrites
        )

    def reads(self, order: Tensor | None) -> Tensor:
        """Columns i64 [local_K] of the linear's whole input that a share of the groups reads."""
        if order is None:
            return torch.arange(*self.columns)
        return order[slice(*self.columns)].long()

    def _shapes(
        self, N: int, K: int, widths: tuple[int, ...]
    ) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        shapes = SHAPES[self.code](N, K, widths)
        if self.linear.owns_order:
            shapes["order"] = (torch.int32, (self.K,))
        return shapes

    def _check_rows(self) -> None:
        ends = [end for rows in self.rows for end in rows]
        if ends[-1] == self.N:
            ends.pop()
        inside = [end for end in ends if end % TILE]
        if self.code == "trellis" and inside:
            raise self._refusal(
                f"would be cut at row {inside[0]}, and trellis codes only at multiples of {TILE}: "
                "use another number of ranks"
            )

    def _cut(self, name: str, stored: Tensor) -> Tensor:
        if name == "order":
            return stored
        if name == "row_scales":
            return self._cut_rows(stored, 0)
        if name == "group_scales":
            return stored[slice(*self.groups)]
        if name == "scales":
            before, kept = (len(kept_groups(self.linear.widths[:end])) for end in self.groups)
            return self._cut_rows(stored[before:kept], 1)
        if name.startswith("tail"):
            return self._cut_rows(stored, 0)
        if name == "codes_tail":
            return self._cut_rows(stored, 0, TILE)
        width = int(name.partition("_")[2].partition("_")[0][1:])
        full = len(self.linear.widths) if name.startswith("zeros") else self.K // GROUP_SIZE
        first, end = (min(group, full) for group in self.groups)
        before = self.linear.widths[:first].count(width)
        count = self.linear.widths[first:end].count(width)
        mine = stored[before : before + count]
        if name.startswith("zeros"):
            return self._cut_zeros(name, mine, width)
        return self._cut_rows(mine, 1, TILE if self.code == "trellis" else 1)

    def _cut_zeros(self, name: str, stored: Tensor, width: int) -> Tensor:
        """Zero points are bits along the rows: unpacked, cut, and packed again."""
        if self.all_rows:
            return stored
        widths = [width] * len(stored)
        zeros = unpack_zeros({name: stored}, widths, self.N)
        if not torch.equal(pack_zeros(zeros, widths)[name], stored):
            where = f"{self.linear.name}.{name}"
            raise FormatError(f"tensor {where} has padding bits that are not 0", param=where)
        return pack_zeros(self._cut_rows(zeros, 1), widths)[name]

    def _cut_rows(self, tensor: Tensor, dim: int, step: int = 1) -> Tensor:
        """The share's rows along `dim`, of which each entry holds `step`."""
        if self.all_rows:
            return tensor
        ranges = [(begin // step, -(-end // step)) for begin, end in self.rows]
        return torch.cat([tensor.narrow(dim, a, b - a) for a, b in ranges], dim)

    def _refusal(self, problem: str) -> FormatError:
        return FormatError(f"{self.linear.name} {problem}", param=self.linear.name)
