"""A launch shape of a kernel of `wgmma.h`: its tables and workspace on the device, and its call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitmill_kernels.hopper.schedule import Arguments, Rings, WarpgroupShape, group_bytes
from bitmill_kernels.workspace import NOTHING, workspace


class Launch:
    """Multiplies any number of tokens, `tokens` in a launch of the kernel."""

    def __init__(
        self,
        table: np.ndarray,
        shape: WarpgroupShape,
        rings: Rings,
        tokens: int,
        device: torch.device,
    ) -> None:
        """table: as `unit_table` makes it."""
        self.shape, self.rings, self.tokens = shape, rings, tokens
        self.units = torch.from_numpy(table).to(device)
        blocks = len(table)
        self._partial = workspace(
            "batch partial", blocks * 2 * shape.rows * tokens * 4, device, fill=NOTHING
        )

    def __call__(
        self,
        function: Callable[..., int],
        x: Tensor,
        y: Tensor,
        *own: Any,
        groups: int,
        scaled: bool,
        overlap: bool,
        **pointers: int | None,
    ) -> None:
        """Call `function` of the library with the arguments, `own`, the shape and the stream.

        x f16 or bf16 [T, K] and y [T, N] of its dtype, rows contiguous. groups: of activations that
        the prologue arranges. scaled: whether tokens are divided by powers of two. overlap: let the
        launch begin while the one before it on the stream drains. pointers: fields of `Arguments`.
        """
        padded = -(-len(x) // self.tokens) * self.tokens
        inputs = workspace("batch inputs", groups * group_bytes(padded), x.device)
        factors = workspace("batch factors", 4 * len(x), x.device) if scaled else None
        arguments = Arguments(
            units=self.units.data_ptr(),
            x=x.data_ptr(),
            inputs=inputs.data_ptr(),
            factors=None if factors is None else factors.data_ptr(),
            partial=self._partial.data_ptr(),
            y=y.data_ptr(),
            tokens=len(x),
            x_stride=x.stride(0),
            output_stride=y.stride(0),
            unit_capacity=self.units.shape[1] - 1,
            stage_count=self.rings.stages,
            stage_bytes=self.rings.stage_bytes,
            slot_count=self.rings.slots,
            is_bf16=int(x.dtype == torch.bfloat16),
            **pointers,
        )
        status = function(
            ctypes.byref(arguments),
            *own,
            self.shape.groups,
            self.tokens,
            len(self.units),
            self.rings.total_bytes,
            int(overlap),
            stream_of(x.device),
        )
        if status != 0:
            raise RuntimeError(
                f"a batch kernel failed to launch with {self.shape} and {self.tokens} tokens: "
                f"cudaError {status}"
            )


def launches_for(launches: Mapping[int, Launch], tokens: int) -> Iterator[tuple[slice, Launch]]:
    """Rows of x and what multiplies them: the largest launch as long as it is filled, for the rest
    the smallest that holds it. `launches` by their tokens, ascending."""
    largest = max(launches)
    full = tokens // largest * largest
    if full:
        yield slice(0, full), launches[largest]
    if full < tokens:
        size = next(size for size in launches if size >= tokens - full)
        yield slice(full, tokens), launches[size]


def stream_of(device: torch.device) -> int | None:
    """The current stream of a CUDA device."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
