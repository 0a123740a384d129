"""Products with linears in trellis codes on a GPU (`product_cuda.cu`).

    y[t, n] = sum_k x[t, k] w[n, k],   x in the source's columns

Linears that share x are multiplied together: x is ordered and rotated once. On Hopper up to 16
tokens of half precision: `decode_cuda.py`; more, as far as `most_tokens` says: `batch_cuda.py`.
Elsewhere up to `FUSED_TOKENS` tokens of half precision: the order and the rotation are applied to x
in a first launch, and a second one multiplies all linears from their circles by tensor cores,
without ever writing a weight. More tokens, or fp32: rows are decoded into a scratch of at most
`SCRATCH_ELEMENTS`, and the vendor's product takes them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from bitmill_kernels.hopper.schedule import BlockShape, WarpgroupShape
from bitmill_kernels.trellis import batch_cuda, decode_cuda
from bitmill_kernels.trellis.building import CIRCLES, built
from bitmill_kernels.trellis.layout import TILE, tile_count
from bitmill_kernels.trellis.product import (
    Member,
    TrellisProduct,
    TrellisWeight,
    member_table,
    stored_groups,
)

FUSED_TOKENS = 32
SCRATCH_ELEMENTS = 1 << 26
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class CudaMember(Member):
    """One of the linears of a product on a CUDA device."""

    def __init__(self, weight: TrellisWeight, K: int, device: torch.device) -> None:
        super().__init__(weight, K, device)
        self._table = _table_of(self.circles, self.rates, K)

    def weights(self, first: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights [end - first, K] in packed, rotated columns; first is a multiple of 16."""
        rows = slice(first, end)
        return _decode(self._table, self.row_scales, self.group_scales, rows, self.K, dtype)


class CudaTrellisProduct(TrellisProduct):
    """Linears on one CUDA device; order and inputs as `TrellisProduct` takes them."""

    member = CudaMember

    def __init__(
        self, weights: Sequence[TrellisWeight], K: int, device: torch.device, **source: Any
    ) -> None:
        super().__init__(weights, K, device, **source)
        self._table = torch.cat([_table_of(one.circles, one.rates, K) for one in self.members])
        self._rows = torch.cat([member.row_scales for member in self.members])
        self._groups = torch.cat([member.group_scales for member in self.members])
        self._stack = member_table(self.outputs, TILE).to(device)
        self._tiles = sum(-(-N // TILE) for N in self.outputs)
        size = self.N * K
        self._decode = None
        if decode_cuda.available(device):
            self._decode = self.decode(decode_cuda.shape_for(size))
        self._batched = batch_cuda.most_tokens(size)
        self._batch = None
        if batch_cuda.available(device):
            rates = tuple(chain.from_iterable(member.rates for member in self.members))
            self._batch = self.batch(batch_cuda.fitting_shapes(rates, size))

    def decode(self, shape: BlockShape) -> decode_cuda.CudaTrellisDecode:
        """The kernel for few tokens on Hopper, by this shape."""
        return decode_cuda.CudaTrellisDecode(self.members, self._order, shape)

    def batch(self, shapes: Mapping[int, WarpgroupShape]) -> batch_cuda.CudaTrellisBatch:
        """The kernel for many tokens on Hopper, by these shapes."""
        return batch_cuda.CudaTrellisBatch(self.members, self._order, shapes)

    def of_source(self, x: Tensor) -> Tensor:
        """y [T, N] of x [T, K] in the source's columns, in the dtype of x."""
        if x.dtype != torch.float32 and len(x) > 0:
            if self._decode is not None and len(x) <= max(decode_cuda.LAUNCHES):
                return self._decode(x.contiguous())
            if self._batch is not None and len(x) <= self._batched:
                return self._batch(x.contiguous())
            if len(x) <= FUSED_TOKENS:
                return self.fused(x.contiguous())
        return self.by_decoded_rows(x)

    def by_decoded_rows(self, x: Tensor) -> Tensor:
        """`of_source` by rows that are decoded into a scratch, for any number of tokens."""
        y = torch.empty(len(x), self.N, dtype=x.dtype, device=x.device)
        if len(x) == 0:
            return y
        x = x.contiguous()
        inner = torch.empty_like(x)
        _check(
            _library().bitmill_trellis_rotate_cuda(
                x.data_ptr(),
                DTYPES[x.dtype],
                len(x),
                self.K,
                None if self._order is None else self._order.data_ptr(),
                inner.data_ptr(),
                torch.cuda.current_stream(x.device).cuda_stream,
            )
        )
        for member, part in zip(self.members, y.split(self.outputs, 1), strict=True):
            for first, W in member.tiles(SCRATCH_ELEMENTS, x.dtype):
                torch.mm(inner, W.t(), out=part[:, first : first + len(W)])
        return y

    def fused(self, x: Tensor) -> Tensor:
        """`of_source` for up to `FUSED_TOKENS` tokens of half precision, contiguous."""
        groups = len(self._table) // len(self.members)
        inner = torch.empty(len(x), 128 * groups, dtype=torch.float16, device=x.device)
        factors = torch.empty(len(self.members), len(x), groups, device=x.device)
        y = torch.empty(len(x), self.N, dtype=x.dtype, device=x.device)
        _check(
            _library().bitmill_trellis_product_cuda(
                x.data_ptr(),
                DTYPES[x.dtype],
                len(x),
                self.K,
                None if self._order is None else self._order.data_ptr(),
                self._table.data_ptr(),
                groups,
                self._groups.data_ptr(),
                self._stack.data_ptr(),
                len(self._stack),
                self._tiles,
                self.N,
                self._rows.data_ptr(),
                inner.data_ptr(),
                factors.data_ptr(),
                y.data_ptr(),
                torch.cuda.current_stream(x.device).cuda_stream,
            )
        )
        return y


def available() -> bool:
    """Whether the kernels are there or can be compiled."""
    return load_library() is not None


def decoded(
    circles: Mapping[str, Tensor],
    row_scales: Tensor,
    group_scales: Tensor,
    K: int,
    rates: Sequence[int],
) -> Tensor:
    """Weights f32 [N, K] in packed, rotated columns.

    circles: as `circle_shapes` names them, contiguous; scales f16 [N] and [G].
    """
    table, rows = _table_of(circles, rates, K), slice(0, len(row_scales))
    return _decode(table, row_scales.float(), group_scales.float(), rows, K, torch.float32)


def _table_of(circles: Mapping[str, Tensor], rates: Sequence[int], K: int) -> Tensor:
    """`Group` of product_cuda.cu of every group, i64 [G, 3]."""
    stored = list(stored_groups(circles, rates, K))
    table = [(one.data_ptr(), rate, tile_count(columns)) for rate, columns, one in stored]
    return torch.tensor(table, dtype=torch.int64).to(stored[0][2].device)


def _decode(
    table: Tensor,
    row_scales: Tensor,
    group_scales: Tensor,
    rows: slice,
    K: int,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(rows.stop - rows.start, K, dtype=dtype, device=row_scales.device)
    _check(
        _library().bitmill_trellis_decode_cuda(
            table.data_ptr(),
            len(table),
            rows.start,
            rows.stop,
            K,
            row_scales.data_ptr(),
            group_scales.data_ptr(),
            DTYPES[dtype],
            out.data_ptr(),
            torch.cuda.current_stream(out.device).cuda_stream,
        )
    )
    return out


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"a launch of the trellis product failed with CUDA error {error}")


def _library() -> ctypes.CDLL:
    library = load_library()
    assert library is not None
    return library


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be built."""
    library = built(
        "product_cuda.cu",
        "bitmill_trellis_product_cuda",
        headers=[CIRCLES],
        extra_cuda_cflags=["-O3", "-std=c++17"],
    )
    if library is not None:
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        library.bitmill_trellis_product_cuda.argtypes = [
            *(pointer, integer, integer, integer, pointer, pointer, integer),
            *(pointer, pointer, integer, integer, integer),
            *(pointer, pointer, pointer, pointer, pointer),
        ]
        library.bitmill_trellis_rotate_cuda.argtypes = [
            *(pointer, integer, integer, integer, pointer, pointer, pointer),
        ]
        library.bitmill_trellis_decode_cuda.argtypes = [
            *(pointer, integer, integer, integer, integer, pointer),
            *(pointer, integer, pointer, pointer),
        ]
    return library
