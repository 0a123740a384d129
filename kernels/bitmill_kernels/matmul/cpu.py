"""Packed linears on a CPU, without a dequantized copy of the weight.

    y = x[:, order] @ W^T + bias

Up to `FUSED_TOKENS` tokens multiply straight from the stored planes, in the compiled kernel
(`cpu_kernel.cpp`). More tokens, or no compiler: a tile of rows is dequantized into the cache,
multiplied by torch and dropped. fp32 inside; the result has the dtype of x.

The kernel is compiled at first use by torch's extension loader and called through ctypes. Where
that fails, tiles are unpacked by torch; the log names the choice once.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bitmill_kernels.compiled import VECTORS, compiled, vector_flags
from bitmill_kernels.layout import (
    GROUP_SIZE,
    PLANES,
    ZERO_STEPS_OF_WIDTH_1,
    group_columns,
    plane_bytes,
)
from bitmill_kernels.matmul.runtime import PackedWeight, in_source_order
from bitmill_kernels.pack import unpack_codes
from bitmill_kernels.reference import dequantize

TILE_ELEMENTS = 1 << 18
FUSED_TOKENS = 8

_LOG = logging.getLogger(__name__)


class _Group(ctypes.Structure):
    """`Group` of cpu_kernel.cpp, field by field."""

    _fields_ = (
        ("planes", ctypes.c_void_p * 2),
        ("bits", ctypes.c_int32 * 2),
        ("bytes", ctypes.c_int32 * 2),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("zero_steps", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("first", ctypes.c_int64),
    )


class CpuProduct:
    """The product of `linear.py` on the stored planes, one linear of the stack after the other."""

    def __init__(self, weights: Sequence[PackedWeight], device: torch.device) -> None:
        self._linears = [_StoredLinear(weight, device) for weight in weights]

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [T, N] of x [T, K]."""
        order = self._linears[0].order
        inputs = (x if order is None else x.index_select(1, order)).float()
        parts = [linear(inputs) for linear in self._linears]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy W [T, K] of dy [T, N]."""
        rows = dy.float().split([linear.rows for linear in self._linears], dim=1)
        parts = [
            linear.input_gradient(part) for linear, part in zip(self._linears, rows, strict=True)
        ]
        return in_source_order(torch.stack(parts).sum(0), self._linears[0].order).to(dy.dtype)


class _StoredLinear:
    """One linear's planes where they are, as the checkpoint file maps them."""

    def __init__(self, weight: PackedWeight, device: torch.device) -> None:
        self._weight = weight
        self._tensors = {
            name: tensor.to(device).contiguous()
            for name, tensor in weight.tensors.items()
            if name.startswith(("codes", "tail", "scales"))
        }
        self.rows = weight.N
        self._scales = self._tensors["scales"]
        self._zeros = weight.zeros().to(device).contiguous()
        self.order = None if weight.order is None else weight.order.to(device)
        self._library = load_library() if device.type == "cpu" else None
        self._groups = self._describe() if self._library is not None else None

    def __call__(self, x: Tensor) -> Tensor:
        """y f32 [T, N] of x f32 [T, K] in packed column order."""
        y = torch.empty(x.shape[0], self._weight.N, device=x.device)
        if self._library is not None and x.shape[0] <= FUSED_TOKENS:
            self._multiply(x, y)
            return y
        for first, tile in self._tiles():
            torch.mm(x, tile.t(), out=y[:, first : first + tile.shape[0]])
        return y

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy W f32 [T, K] in packed column order of dy f32 [T, N]."""
        dx = torch.zeros(dy.shape[0], self._weight.K, device=dy.device)
        for first, tile in self._tiles():
            dx.addmm_(dy[:, first : first + tile.shape[0]], tile)
        return dx

    def _tiles(self) -> Iterator[tuple[int, Tensor]]:
        """The first row of each tile, and its weights f32 [rows, K] in packed column order."""
        rows = max(1, TILE_ELEMENTS // self._weight.K)
        for first in range(0, self._weight.N, rows):
            yield first, self._dequantize(first, min(self._weight.N, first + rows))

    def _multiply(self, x: Tensor, y: Tensor) -> None:
        groups = len(self._weight.widths)
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP_SIZE)).view(
            -1, groups, GROUP_SIZE
        )
        sums = padded.sum(-1).t().contiguous()
        inputs = padded.transpose(0, 1).contiguous()
        assert self._library is not None
        self._library.bitmill_multiply(
            self._groups,
            groups,
            self._weight.N,
            x.shape[0],
            inputs.data_ptr(),
            sums.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )

    def _dequantize(self, first: int, end: int) -> Tensor:
        """Weights f32 [end - first, K] in packed column order."""
        widths, K = self._weight.widths, self._weight.K
        if self._library is not None:
            tile = torch.empty(end - first, K)
            threads = torch.get_num_threads()
            self._library.bitmill_dequantize(
                self._groups, len(widths), first, end, tile.data_ptr(), K, threads
            )
            return tile
        planes = {
            name: tensor[:, first:end] if name.startswith("codes") else tensor[first:end]
            for name, tensor in self._tensors.items()
            if name != "scales"
        }
        codes = unpack_codes(planes, widths, end - first, K)
        return dequantize(codes, self._scales[:, first:end], self._zeros[:, first:end], widths)

    def _describe(self) -> ctypes.Array[_Group]:
        """One `Group` for each group, pointing into the stored tensors."""
        columns = group_columns(self._weight.K)
        groups = (_Group * len(columns))()
        seen = dict.fromkeys(PLANES, 0)
        for g, (width, count) in enumerate(zip(self._weight.widths, columns, strict=True)):
            group = groups[g]
            for p, plane in enumerate(PLANES[width]):
                if count == GROUP_SIZE:
                    stored = self._tensors[f"codes_b{width}_p{plane}"][seen[width]]
                else:
                    stored = self._tensors[f"tail_p{plane}"]
                group.planes[p], group.bits[p] = stored.data_ptr(), plane
                group.bytes[p] = plane_bytes(plane, count)
            seen[width] += 1
            group.scales, group.zeros = self._scales[g].data_ptr(), self._zeros[g].data_ptr()
            group.zero_steps = ZERO_STEPS_OF_WIDTH_1 if width == 1 else 1
            group.columns, group.first = count, g * GROUP_SIZE
        return groups


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where it cannot be built or BITMILL_CPU_KERNEL is "0"."""
    if os.environ.get("BITMILL_CPU_KERNEL", "1") == "0":
        _LOG.info("packed linears on the CPU unpack tiles with torch: BITMILL_CPU_KERNEL is 0")
        return None
    try:
        library = _build()
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = str(error).partition("\n")[0]
        _LOG.warning("packed linears on the CPU unpack tiles with torch, slowly: %s", reason)
        return None
    _LOG.info("packed linears on the CPU run in the compiled kernel")
    return library


def _build() -> ctypes.CDLL:
    flags = ["-O3", *vector_flags(), "-fopenmp"]
    source = Path(__file__).with_name("cpu_kernel.cpp")
    built = compiled(
        "bitmill_cpu",
        [source],
        headers=[VECTORS],
        extra_cflags=flags,
        extra_ldflags=["-fopenmp"],
    )
    library = ctypes.CDLL(str(built))
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.bitmill_multiply.argtypes = [
        *(pointer, integer, integer, integer),
        *(pointer, pointer, pointer, integer),
    ]
    library.bitmill_multiply.restype = None
    library.bitmill_dequantize.argtypes = [
        *(pointer, integer, integer, integer),
        *(pointer, long, integer),
    ]
    library.bitmill_dequantize.restype = None
    return library
