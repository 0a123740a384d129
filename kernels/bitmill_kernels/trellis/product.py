"""Products with linears in trellis codes (`layout.py`), without a dequantized copy of the weight.

    y[t, n] = row_scale[n] * sum_k x[t, k] * group_scale[g] * value[n, k]

x is in packed columns, rotated, or in the source's: then it is ordered and rotated once for all
linears that share it. On a CPU up to `FUSED_TOKENS` tokens are rotated by the compiled kernel
(`product_cpu.cpp`) and multiply straight from the circles. More tokens, or no compiler: a tile of
rows is decoded into the cache, multiplied and dropped. fp32 inside.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from bitmill_kernels.compiled import VECTORS, vector_flags
from bitmill_kernels.layout import GROUP_SIZE, group_columns
from bitmill_kernels.trellis.building import built
from bitmill_kernels.trellis.code import decode_tiles, untiled
from bitmill_kernels.trellis.layout import TILE, TILES, tile_count

TILE_ELEMENTS = 1 << 18
"""Weights that are decoded at once."""
FUSED_TOKENS = 8


class _Group(ctypes.Structure):
    """`Group` of product_cpu.cpp, field by field."""

    _fields_ = (
        ("circles", ctypes.c_void_p),
        ("rate", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True)
class TrellisWeight:
    """A linear as it is stored.

    circles: as `circle_shapes` names them; row_scales f16 [N], group_scales f16 [G]; rates [G].
    """

    circles: Mapping[str, Tensor]
    row_scales: Tensor
    group_scales: Tensor
    rates: tuple[int, ...]


class Member:
    """One of the linears of a product, of K columns, on its device.

    circles: contiguous; row_scales f32 [N], group_scales f32 [G].
    """

    def __init__(self, weight: TrellisWeight, K: int, device: torch.device) -> None:
        self.N, self.K, self.rates = len(weight.row_scales), K, weight.rates
        self.circles = {key: one.to(device).contiguous() for key, one in weight.circles.items()}
        self.row_scales = weight.row_scales.to(device).float()
        self.group_scales = weight.group_scales.to(device).float()
        self._columns = per_column(self.group_scales, K)
        self._library = load_library() if device.type == "cpu" else None
        self._described = self._describe() if self._library is not None else None

    def multiply(self, x: Tensor, y: Tensor) -> None:
        """Write y f32 [T, N], rows contiguous, of x f32 [T, K] in packed, rotated columns."""
        if self._library is None or len(x) > FUSED_TOKENS:
            for first, tile in self.tiles():
                y[:, first : first + len(tile)] = torch.mm(x, tile.t())
            return
        self._library.bitmill_trellis_multiply(
            self._described,
            len(self.rates),
            self.N,
            self.K,
            len(x),
            x.data_ptr(),
            self.row_scales.data_ptr(),
            y.data_ptr(),
            y.stride(0),
            torch.get_num_threads(),
        )

    def tiles(
        self, elements: int = TILE_ELEMENTS, dtype: torch.dtype = torch.float32
    ) -> Iterator[tuple[int, Tensor]]:
        """The first row of each tile of rows, and its weights [rows, K].

        elements: that a tile has at most; it has at least 16 rows.
        """
        rows = max(TILE, elements // self.K // TILE * TILE)
        for first in range(0, self.N, rows):
            yield first, self.weights(first, min(self.N, first + rows), dtype)

    def weights(self, first: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights [end - first, K] in packed, rotated columns; first is a multiple of 16."""
        if self._library is not None:
            out = torch.empty(end - first, self.K)
            self._library.bitmill_trellis_decode(
                self._described,
                len(self.rates),
                first,
                end,
                self.row_scales.data_ptr(),
                out.data_ptr(),
                self.K,
                torch.get_num_threads(),
            )
            return out.to(dtype)
        values = decode_rows(self.circles, self.rates, self.K, first, end)
        return values.mul_(self._columns).mul_(self.row_scales[first:end, None]).to(dtype)

    def _describe(self) -> ctypes.Array[_Group]:
        """One `Group` for each group, pointing into the stored tensors."""
        groups = (_Group * len(self.rates))()
        stored = stored_groups(self.circles, self.rates, self.K)
        scales = self.group_scales.tolist()
        for group, (rate, columns, circles), scale in zip(groups, stored, scales, strict=True):
            group.circles, group.rate, group.scale = circles.data_ptr(), rate, scale
            group.columns = tile_count(columns)
        return groups


class TrellisProduct:
    """Linears of K columns that share their input, on one device; outputs lie side by side.

    inputs: brings x f32 [T, K] from the source's columns into packed, rotated ones (`of_source`).
    order i32 [K] or None, and signs f32 [K] say the same to kernels that do so themselves; signs
    are None where the rotation is not that of docs/format.md.
    """

    member: type[Member] = Member

    def __init__(
        self,
        weights: Sequence[TrellisWeight],
        K: int,
        device: torch.device,
        *,
        order: Tensor | None = None,
        signs: Tensor | None = None,
        inputs: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Raises ValueError for linears of another number of groups."""
        for weight in weights:
            if len(weight.rates) != len(group_columns(K)):
                raise ValueError(
                    f"a linear has {len(weight.rates)} groups: {K} columns are "
                    f"{len(group_columns(K))}"
                )
        self.members = [self.member(weight, K, device) for weight in weights]
        self.outputs = tuple(member.N for member in self.members)
        self.N, self.K = sum(self.outputs), K
        self._order = None if order is None else order.to(device)
        self._signed = None
        if device.type == "cpu" and load_library() is not None and signs is not None:
            self._signed = _signed(self._order, signs)
        self._inputs = inputs

    def __call__(self, x: Tensor) -> Tensor:
        """y f32 [T, N] of x f32 [T, K] in packed, rotated columns."""
        x, y = x.contiguous(), torch.empty(len(x), self.N, device=x.device)
        for member, part in zip(self.members, y.split(self.outputs, 1), strict=True):
            member.multiply(x, part)
        return y

    def of_source(self, x: Tensor) -> Tensor:
        """y [T, N] of x [T, K] in the source's columns, in the dtype of x."""
        return self(self._rotated(x.float())).to(x.dtype)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy W f32 [T, K] in packed, rotated columns of dy f32 [T, N]."""
        dx = torch.zeros(len(dy), self.K, device=dy.device)
        for member, part in zip(self.members, dy.split(self.outputs, 1), strict=True):
            for first, tile in member.tiles():
                dx.addmm_(part[:, first : first + len(tile)], tile)
        return dx

    def _rotated(self, x: Tensor) -> Tensor:
        """x f32 [T, K] of the source's columns in packed, rotated ones, for all members."""
        if self._signed is None or len(x) > FUSED_TOKENS:
            assert self._inputs is not None
            return self._inputs(x)
        library = load_library()
        assert library is not None
        x, out = x.contiguous(), torch.empty(x.shape)
        library.bitmill_trellis_rotate(
            *(len(x), self.K, x.data_ptr(), self._signed.data_ptr(), out.data_ptr()),
            torch.get_num_threads(),
        )
        return out


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it cannot be built or BITMILL_CPU_KERNEL is "0"."""
    if os.environ.get("BITMILL_CPU_KERNEL", "1") == "0":
        return None
    library = built(
        "product_cpu.cpp",
        "bitmill_trellis_product",
        headers=[VECTORS],
        extra_cflags=["-O3", *vector_flags(), "-fopenmp"],
        extra_ldflags=["-fopenmp"],
    )
    if library is not None:
        pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        library.bitmill_trellis_multiply.argtypes = [
            *(pointer, integer, integer, integer, integer, pointer),
            *(pointer, pointer, long, integer),
        ]
        library.bitmill_trellis_multiply.restype = None
        library.bitmill_trellis_rotate.argtypes = [
            *(integer, integer, pointer, pointer, pointer, integer)
        ]
        library.bitmill_trellis_rotate.restype = None
        library.bitmill_trellis_decode.argtypes = [
            *(pointer, integer, integer, integer),
            *(pointer, pointer, long, integer),
        ]
        library.bitmill_trellis_decode.restype = None
    return library


def _signed(order: Tensor | None, signs: Tensor) -> Tensor:
    """Both in one i32 [K], as the kernel takes them: ~order where the sign is negative."""
    columns = torch.arange(len(signs), dtype=torch.int32) if order is None else order
    return torch.where(signs < 0, ~columns, columns)


def per_column(group_scales: Tensor, K: int) -> Tensor:
    """f32 [K] of one value per group, f32 [G]."""
    columns = torch.tensor(group_columns(K), device=group_scales.device)
    return group_scales.repeat_interleave(columns, output_size=K)


def stored_groups(
    circles: Mapping[str, Tensor], rates: Sequence[int], K: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Rate, columns and circles u8 [tile rows, tile columns, 32 k] of every group in turn."""
    seen = dict.fromkeys(circles, 0)
    for rate, columns in zip(rates, group_columns(K), strict=True):
        key = f"codes_r{rate}" if columns == GROUP_SIZE else "codes_tail"
        yield rate, columns, circles[key][seen[key]] if columns == GROUP_SIZE else circles[key]
        seen[key] += 1


def decode_rows(
    circles: Mapping[str, Tensor], rates: Sequence[int], K: int, first: int, end: int
) -> Tensor:
    """Values f32 [end - first, K] of some rows, before any scale; first is a multiple of 16."""
    tiles = slice(first // TILE, -(-end // TILE))
    parts = [
        untiled(decode_tiles(stored[tiles], rate))[: end - first, :columns].float()
        for rate, columns, stored in stored_groups(circles, rates, K)
    ]
    return torch.cat(parts, 1)


def member_table(outputs: Sequence[int], rows: int) -> Tensor:
    """`Member` of circles_cuda.h of each linear, i32 [M, 4]; tiles have so many rows."""
    table = torch.zeros(len(outputs), 4, dtype=torch.int32)
    tile = output = 0
    for member, N in zip(table, outputs, strict=True):
        member[:3] = torch.tensor((tile, N, output))
        tile, output = tile + -(-N // rows), output + N
    return table


def full_circles(circles: Tensor) -> Tensor:
    """Circles u8 [tile rows, 8, 32 k]: a short group is filled up, x being 0 there."""
    missing = TILES - circles.shape[1]
    return functional.pad(circles, (0, 0, 0, missing)) if missing else circles
