"""Launching of the CUDA dequantize kernel (`dequantize_cuda.cu`)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill_kernels.layout import GROUP_SIZE, group_columns
from bitmill_kernels.matmul.cuda_library import load_library
from bitmill_kernels.matmul.dequantize_triton import RowRun, row_runs
from bitmill_kernels.matmul.runtime import Member, Pair, RuntimeWeight

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class _Arguments(ctypes.Structure):
    """`DequantizeArguments` of dequantize_cuda.cu, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("planes", "grid", "pairs", "out")),
        *((name, ctypes.c_int) for name in ("pair_count", "row", "rows", "K", "dtype")),
    )


@dataclass(frozen=True)
class _Part:
    """Rows [row, row + rows) of one member, `offset` rows into a run."""

    first_pair: int
    pairs: int
    row: int
    rows: int
    offset: int


class CudaDequantizer:
    """Writes runs of dequantized rows of one `RuntimeWeight`, as `Dequantizer` does in Triton."""

    def __init__(self, weight: RuntimeWeight, max_rows: int) -> None:
        """Runs hold `max_rows` rows, rounded up to whole tiles of 64, but for the last."""
        self._library = load_library()
        self._weight = weight
        columns = group_columns(weight.K)
        pairs = [_place(pair, columns) for member in weight.members for pair in member.pairs]
        self._pairs = torch.tensor(pairs, dtype=torch.int32, device=weight.planes.device)
        self.runs = row_runs(weight, max_rows)
        self._parts = {run: _parts(weight.members, run) for run in self.runs}

    def __call__(self, run: RowRun, out: Tensor) -> None:
        """Fill out [run.rows, K], f16, bf16 or f32, contiguous; of dropped groups nothing."""
        K, weight = self._weight.K, self._weight
        stream = torch.cuda.current_stream(out.device).cuda_stream
        for part in self._parts[run]:
            arguments = _Arguments(
                planes=weight.planes.data_ptr(),
                grid=weight.grid.data_ptr(),
                pairs=self._pairs[part.first_pair].data_ptr(),
                out=out.data_ptr() + part.offset * K * out.element_size(),
                pair_count=part.pairs,
                row=part.row,
                rows=part.rows,
                K=K,
                dtype=DTYPES[out.dtype],
            )
            status = self._library.bitmill_dequantize_rows(ctypes.byref(arguments), stream)
            if status != 0:
                raise RuntimeError(f"the CUDA dequantize kernel failed: cudaError {status}")


def _place(pair: Pair, columns: list[int]) -> list[int]:
    first = [0 if group is None else group * GROUP_SIZE for group in pair.groups]
    live = [0 if group is None else columns[group] for group in pair.groups]
    return [pair.width, pair.low // 16, pair.high // 16, pair.grid // 16, *first, *live]


def _parts(members: tuple[Member, ...], run: RowRun) -> list[_Part]:
    parts: list[_Part] = []
    first_pair = 0
    for member in members:
        begin = max(run.first, member.first_output)
        end = min(run.first + run.rows, member.first_output + member.N)
        if begin < end:
            row = begin - member.first_output
            parts.append(_Part(first_pair, len(member.pairs), row, end - begin, begin - run.first))
        first_pair += len(member.pairs)
    return parts
