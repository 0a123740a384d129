"""The accelerator's own layout of packed linears, built at load and never stored.

Groups of one width are taken two at a time. A pair of groups (A, B) of width b holds, for each
plane of w bits, 16-bit lanes whose low byte is group A's byte and whose high byte is group B's:

    lane i of a row = byte_A[i] | byte_B[i] << 8          [pairs, N, 16w] lanes, rows contiguous

so that one 32-bit AND extracts a field of two columns, every row of a pair is 32w contiguous
bytes, and planes are joined without moving bytes. A class with an odd number of groups gets a
dummy group of scale 0. The tail is padded to a full group of zero codes, rows to `ROW_ALIGNMENT`
with scale 0. Scale and zero point of a row and group are two fp16 halves of one 32-bit word,
[pairs, N, 2] words; fp16 holds every zero point exactly (0..255, or eighths for width 1).

A dropped group, of width 0, is in no pair, so it takes neither bytes nor time. A linear that is
dropped whole has one pair of dummies, so that its outputs are written.

Several linears that read the same input, siblings, are stacked by rows into one runtime layout
and run in one launch. Each keeps its own widths, hence its own order of pairs: a member.

Pairs of all members are numbered through. The prologue (`prologue.py`) writes the activations in
that order, so each pair reads 256 consecutive columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill_kernels.layout import (
    GROUP_SIZE,
    PLANES,
    WIDTHS,
    group_columns,
    group_count,
    groups_of_width,
)
from bitmill_kernels.pack import join_planes, pack_codes, unpack_zeros
from bitmill_kernels.reference import real_zeros

ROW_ALIGNMENT = 128


@dataclass(frozen=True)
class PackedWeight:
    """One linear as stored: planes by format name, scales f16 [G, N], packed zeros by name.

    Scales of dropped groups are 0; the rest of such a group is not there.
    """

    tensors: Mapping[str, Tensor]
    widths: tuple[int, ...]
    N: int
    K: int
    order: Tensor | None = None

    def scales(self) -> Tensor:
        return self.tensors["scales"]

    def zeros(self) -> Tensor:
        """Stored zero points u8 [G, N]."""
        return unpack_zeros(self.tensors, self.widths, self.N)


@dataclass(frozen=True)
class Pair:
    """Two groups of one width, addressed inside a `RuntimeWeight`.

    low, high: byte offsets of the pair's planes; grid: byte offset of its scale and zero words.
    groups: the two source groups, None for a dummy. Offsets are multiples of 16.
    """

    width: int
    groups: tuple[int | None, int | None]
    low: int
    high: int
    grid: int


@dataclass(frozen=True)
class Member:
    """One linear of a stack: N rows padded to `rows`, its pairs, its first output column."""

    N: int
    rows: int
    first_output: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class RuntimeWeight:
    """Stacked linears in the accelerator's layout.

    planes: u8 [bytes], grid: i32 [words], slots: i32 [2 * pairs, 4] = (first packed column, live
    columns, bits of the low plane, width) of each group in pair order, order: i32 [K] or None.
    """

    K: int
    N: int
    members: tuple[Member, ...]
    planes: Tensor
    grid: Tensor
    slots: Tensor
    order: Tensor | None

    @property
    def pair_count(self) -> int:
        """Pairs of all members."""
        return sum(len(member.pairs) for member in self.members)

    @property
    def dropped(self) -> bool:
        """Whether some member has groups without a pair, of which nothing writes the weights."""
        paired = [g for m in self.members for p in m.pairs for g in p.groups if g is not None]
        return len(paired) < len(self.members) * group_count(self.K)

    @property
    def width_mask(self) -> int:
        """Bit i is set where the i-th of `WIDTHS` is present."""
        present = {pair.width for member in self.members for pair in member.pairs}
        return sum(1 << i for i, width in enumerate(WIDTHS) if width in present)

    @property
    def nbytes(self) -> int:
        """Bytes read by one pass over the weight: planes, scales and zeros."""
        return self.planes.nbytes + self.grid.nbytes


def in_source_order(matrix: Tensor, order: Tensor | None) -> Tensor:
    """matrix [R, K] in packed column order, its columns moved to where the source has them.

    order: i32 [K], packed column k is source column order[k]; None where the orders are one.
    """
    if order is None:
        return matrix
    source = torch.empty_like(matrix)
    source[:, order.to(matrix.device).long()] = matrix
    return source


def build_runtime(weights: Sequence[PackedWeight], device: torch.device) -> RuntimeWeight:
    """Lay stored linears out for the accelerator; several must share K and the column order.

    Raises ValueError where they do not.
    """
    _require_siblings(weights)
    planes: list[Tensor] = []
    grids: list[Tensor] = []
    members: list[Member] = []
    slots: list[tuple[int, int, int, int]] = []
    plane_offset = grid_offset = outputs = 0
    for weight in weights:
        rows = -(-weight.N // ROW_ALIGNMENT) * ROW_ALIGNMENT
        chunks, pairs = _pair_planes(weight, rows, plane_offset, grid_offset, device)
        planes += chunks
        plane_offset += sum(chunk.numel() for chunk in chunks)
        grids.append(_pair_grid(weight, rows, pairs, device))
        grid_offset += grids[-1].nbytes
        slots += _slots(weight, pairs)
        members.append(Member(weight.N, rows, outputs, tuple(pairs)))
        outputs += weight.N
    order = weights[0].order
    return RuntimeWeight(
        K=weights[0].K,
        N=outputs,
        members=tuple(members),
        planes=torch.cat(planes) if len(planes) > 1 else planes[0],
        grid=torch.cat(grids) if len(grids) > 1 else grids[0],
        slots=torch.tensor(slots, dtype=torch.int32, device=device),
        order=None if order is None else order.to(device, torch.int32),
    )


def _require_siblings(weights: Sequence[PackedWeight]) -> None:
    first = weights[0]
    for weight in weights[1:]:
        same = weight.order is first.order or (
            weight.order is not None
            and first.order is not None
            and torch.equal(weight.order, first.order)
        )
        if weight.K != first.K or not same:
            raise ValueError(
                f"linears of K={first.K} and K={weight.K} cannot be stacked: siblings must read "
                "the same columns in the same order"
            )


def _pair_planes(
    weight: PackedWeight, rows: int, plane_offset: int, grid_offset: int, device: torch.device
) -> tuple[list[Tensor], list[Pair]]:
    """Flat planes u8 of every width present, and the pairs that address them."""
    chunks: list[Tensor] = []
    pairs: list[Pair] = []
    for width in WIDTHS:
        groups = groups_of_width(weight.widths, width)
        if not groups:
            continue
        count = -(-len(groups) // 2)
        starts = []
        for plane in PLANES[width]:
            stored = _full_planes(weight, width, plane, device)
            stored = torch.nn.functional.pad(
                stored, (0, 0, 0, rows - weight.N, 0, 2 * count - len(groups))
            )
            chunks.append(torch.stack((stored[0::2], stored[1::2]), dim=-1).flatten())
            starts.append(plane_offset)
            plane_offset += chunks[-1].numel()
        for i in range(count):
            low, *high = (
                start + i * rows * 2 * GROUP_SIZE // 8 * plane
                for start, plane in zip(starts, PLANES[width], strict=True)
            )
            second = groups[2 * i + 1] if 2 * i + 1 < len(groups) else None
            grid = grid_offset + len(pairs) * rows * 8
            pairs.append(Pair(width, (groups[2 * i], second), low, high[0] if high else 0, grid))
    if not pairs:
        blank = torch.zeros(rows * 2 * GROUP_SIZE // 8, dtype=torch.uint8, device=device)
        return [blank], [Pair(1, (None, None), plane_offset, 0, grid_offset)]
    return chunks, pairs


def _full_planes(weight: PackedWeight, width: int, plane: int, device: torch.device) -> Tensor:
    """One plane u8 [Z_b, N, 16w] of all groups of a width, the tail padded to a full group."""
    parts = []
    name = f"codes_b{width}_p{plane}"
    if name in weight.tensors:
        parts.append(weight.tensors[name].to(device))
    tail = weight.K % GROUP_SIZE
    if tail and weight.widths[-1] == width:
        stored = [weight.tensors[f"tail_p{p}"].to(device) for p in PLANES[width]]
        codes = join_planes(stored, width)[:, :tail]
        full = pack_codes(torch.nn.functional.pad(codes, (0, GROUP_SIZE - tail)), [width])
        parts.append(full[name])
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _pair_grid(
    weight: PackedWeight, rows: int, pairs: Sequence[Pair], device: torch.device
) -> Tensor:
    """Words i32 [pairs * rows * 2]: fp16 scale in the low half, fp16 zero point in the high."""
    scales = weight.scales().to(device)
    zeros = real_zeros(weight.zeros().to(device), weight.widths).half()
    words = torch.zeros(2 * len(pairs), rows, 2, dtype=torch.float16, device=device)
    groups = [group for pair in pairs for group in pair.groups]
    slots = [slot for slot, group in enumerate(groups) if group is not None]
    found = [group for group in groups if group is not None]
    words[slots, : weight.N, 0] = scales[found]
    words[slots, : weight.N, 1] = zeros[found]
    by_pair = words.view(torch.int32).view(len(pairs), 2, rows)
    return by_pair.transpose(1, 2).flatten()


def _slots(weight: PackedWeight, pairs: Sequence[Pair]) -> list[tuple[int, int, int, int]]:
    columns = group_columns(weight.K)
    return [
        (0, 0, PLANES[pair.width][0], pair.width)
        if group is None
        else (group * GROUP_SIZE, columns[group], PLANES[pair.width][0], pair.width)
        for pair in pairs
        for group in pair.groups
    ]


def dequantize_runtime(weight: RuntimeWeight) -> Tensor:
    """Weights f32 [N, K] in packed column order: the obvious reader of this layout."""
    out = torch.zeros(weight.N, weight.K, device=weight.planes.device)
    for member in weight.members:
        for pair in member.pairs:
            words = weight.grid[pair.grid // 4 :][: member.rows * 2].view(torch.float16)
            scale, zero = words.view(member.rows, 2, 2).float().unbind(-1)
            for half, group in enumerate(pair.groups):
                if group is None:
                    continue
                codes = _codes_of(weight, member, pair, half)
                value = scale[:, half, None] * (codes.float() - zero[:, half, None])
                start = group * GROUP_SIZE
                live = min(GROUP_SIZE, weight.K - start)
                rows = out[member.first_output : member.first_output + member.N]
                rows[:, start : start + live] = value[: member.N, :live]
    return out


def _codes_of(weight: RuntimeWeight, member: Member, pair: Pair, half: int) -> Tensor:
    planes = []
    for plane, offset in zip(PLANES[pair.width], (pair.low, pair.high), strict=False):
        lanes = weight.planes[offset:][: member.rows * 32 * plane]
        planes.append(lanes.view(member.rows, 16 * plane, 2)[..., half])
    return join_planes(planes, pair.width)
