"""The storage layout of packed weights, as plain integers: no tensor library is loaded.

A linear has N output rows and K input columns. Columns are cut into groups of `GROUP_SIZE`; the
last group, the tail, may be shorter. A group has one bit width b for all rows. A code of b bits
is stored in one or two planes whose widths are powers of two, so that no field crosses a byte:

    code = low plane + (high plane << width of the low plane)
    byte i, field j (bits j*w and up) of a plane of width w holds column j*L + i of the group,
    L = w * ceil(columns / 8) bytes per row, 16*w for a full group

Zero points are packed apart, `zero_bits(b)` bits a row, least significant bit first. Width 1
stores its zero point in eighths (4 bits, zero = stored / 8), so that its two levels need not
include 0; every other width stores an integer of 0..2^b-1.

Width 7 is left out: it would need three planes. A group of width 0 is dropped: its weights are 0,
and nothing of it is stored, neither planes nor scales nor zero points.
"""

from __future__ import annotations

from collections.abc import Sequence

GROUP_SIZE = 128
WIDTHS = (1, 2, 3, 4, 5, 6, 8)
"""Widths that have codes; those that a group may have are the keys of `PLANES`."""
PLANES: dict[int, tuple[int, ...]] = {
    0: (),
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    8: (8,),
}
ZERO_STEPS_OF_WIDTH_1 = 8


def group_count(K: int) -> int:
    """Number of groups of K columns, the tail included."""
    return -(-K // GROUP_SIZE)


def group_columns(K: int) -> list[int]:
    """Columns of every group of K columns; only the last may be fewer than `GROUP_SIZE`."""
    full, tail = divmod(K, GROUP_SIZE)
    return [GROUP_SIZE] * full + ([tail] if tail else [])


def zero_bits(width: int) -> int:
    """Stored bits of one zero point: the width itself, but 4 for width 1."""
    return 4 if width == 1 else width


def plane_bytes(plane: int, columns: int) -> int:
    """Bytes of one row of a plane of `plane` bits over `columns` columns of one group."""
    return plane * -(-columns // 8)


def check_widths(widths: Sequence[int], K: int) -> None:
    """Raise ValueError unless `widths` names one legal width for each group of K columns."""
    if len(widths) != group_count(K):
        raise ValueError(
            f"{len(widths)} widths for K={K}: give one width for each of its "
            f"{group_count(K)} groups of {GROUP_SIZE} columns"
        )
    for width in widths:
        if width not in PLANES:
            raise ValueError(f"width {width} is not supported: use one of {tuple(PLANES)}")


def groups_of_width(widths: Sequence[int], width: int) -> list[int]:
    """Indices of the groups of one width, ascending."""
    return [group for group, w in enumerate(widths) if w == width]


def kept_groups(widths: Sequence[int]) -> list[int]:
    """Indices of the groups that are not dropped, ascending."""
    return [group for group, width in enumerate(widths) if width]


def code_tensor_shapes(N: int, K: int, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes (u8) of the code planes of a linear: `codes_b{b}_p{w}`, `tail_p{w}`.

    A plane that would be empty is absent.
    """
    check_widths(widths, K)
    full, tail = divmod(K, GROUP_SIZE)
    shapes: dict[str, tuple[int, ...]] = {}
    full_widths = tuple(widths[:full])
    for width in WIDTHS:
        count = full_widths.count(width)
        if count and N:
            for plane in PLANES[width]:
                shapes[f"codes_b{width}_p{plane}"] = (count, N, plane_bytes(plane, GROUP_SIZE))
    if tail and N:
        for plane in PLANES[widths[-1]]:
            shapes[f"tail_p{plane}"] = (N, plane_bytes(plane, tail))
    return shapes


def scale_tensor_shapes(N: int, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Name and shape (f16) of the stored scales of a linear: those of groups that have codes."""
    kept = len(kept_groups(widths))
    return {"scales": (kept, N)} if kept else {}


def zero_tensor_shapes(N: int, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes (u8) of the packed zero points of a linear: `zeros_b{b}`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for width in WIDTHS:
        count = tuple(widths).count(width)
        if count and N:
            shapes[f"zeros_b{width}"] = (count, -(-N * zero_bits(width) // 8))
    return shapes
