"""The circles of a tile's values with the least squared error (`code.py`).

Viterbi's algorithm finds the best path through all states. For a circle it runs twice: over the
steps around the seam, free at both ends, which gives the bits across the seam; then around, from
there to there. `encode_tiles` takes the compiled kernel, on a GPU that of `group.py`, which takes
whole groups; `encode_reference` is the plain version.

Errors of rows may count differently. Rows r and r + 8 of a tile take turns in the sequence, and 16
bits decide each value, of which its neighbours share most. So the path gives more bits to the row
that counts more, as if that had a higher rate: the mean of what both lose falls from the arithmetic
to the geometric mean of what they count.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch
from torch import Tensor

from bitmill_kernels.backend import wants_reference
from bitmill_kernels.compiled import VECTORS, vector_flags
from bitmill_kernels.trellis import group_cuda
from bitmill_kernels.trellis.building import built
from bitmill_kernels.trellis.code import row_of_values, table, to_circles, values_per_state
from bitmill_kernels.trellis.layout import LARGEST, SEAM, TILE, tile_bytes

_NEVER = 1e30


def encode_tiles(targets: Tensor, rate: int, emphasis: Tensor | None = None) -> Tensor:
    """Circles u8 [T, 32 rate] for targets f32 [T, 256], in the sequence of the circle.

    emphasis: f32 [T, 16], what errors of each row are multiplied by before they are squared, 0.5 to
    2 as `emphases` makes them; None for 1.
    """
    emphasis = _given(emphasis, targets)
    if not len(targets):
        return torch.empty(0, tile_bytes(rate), dtype=torch.uint8, device=targets.device)
    if wants_reference("auto"):
        return encode_reference(targets, rate, emphasis)
    if targets.is_cuda and group_cuda.available():
        return group_cuda.encode_tiles(targets, rate, emphasis)
    library = load_library() if targets.device.type == "cpu" else None
    if library is None:
        return encode_reference(targets, rate, emphasis)
    scaled, emphasis = _emphasized(targets, emphasis), emphasis.float().contiguous()
    circles = torch.empty(len(targets), tile_bytes(rate), dtype=torch.uint8)
    values = table(rate, targets.device)
    library.bitmill_trellis_encode(
        scaled.data_ptr(),
        emphasis.data_ptr(),
        len(targets),
        values.data_ptr(),
        rate,
        SEAM[rate],
        circles.data_ptr(),
        torch.get_num_threads(),
    )
    return circles


def encode_reference(targets: Tensor, rate: int, emphasis: Tensor | None = None) -> Tensor:
    """`encode_tiles` in plain torch."""
    emphasis = _given(emphasis, targets)
    V = values_per_state(rate)
    values = table(rate, targets.device)
    of_steps = emphasis[:, row_of_values(targets.device)[::V]]
    path = best_circle(_emphasized(targets, emphasis), values, rate * V, SEAM[rate], of_steps)
    return to_circles(path, rate)


def _given(emphasis: Tensor | None, targets: Tensor) -> Tensor:
    if emphasis is None:
        return torch.ones(len(targets), TILE, device=targets.device)
    return emphasis


def _emphasized(targets: Tensor, emphasis: Tensor) -> Tensor:
    """Targets f32 [T, 256] times the emphasis [T, 16] of their rows, and within bounds."""
    scaled = targets.float() * emphasis[:, row_of_values(targets.device)]
    return scaled.clamp(-LARGEST, LARGEST)


def best_circle(targets: Tensor, values: Tensor, step: int, seam: int, emphasis: Tensor) -> Tensor:
    """States i64 [T, S] of the path around for targets f32 [T, S V], times their emphasis.

    values: f32 [2^L, V] by state; step: bits a step; seam: steps on each side of it; emphasis: f32
    [T, S], what the values of a step are multiplied by.
    """
    x = targets.float().unflatten(1, (-1, values.shape[1]))

    def around(of_steps: Tensor) -> Tensor:
        return torch.cat([of_steps[:, -seam:], of_steps[:, :seam]], 1)

    first = _best_path(around(x), around(emphasis), values, step, None)[:, seam]
    return _best_path(x, emphasis, values, step, first & ((len(values) >> step) - 1))


def _best_path(
    x: Tensor, emphasis: Tensor, values: Tensor, step: int, ends: Tensor | None
) -> Tensor:
    """States i64 [T, S] of least sum |x - s v|^2 for x [T, S, V] and s [T, S]; ends i64 [T]: the
    bits that the first state and those behind the last one begin with, None where they are free."""
    count = len(values) >> step
    kept = x.new_zeros(len(x), count)
    if ends is not None:
        kept = torch.full_like(kept, _NEVER).scatter_(1, ends[:, None], 0.0)
    olds = []
    for t in range(x.shape[1]):
        cost = (x[:, t, None] - emphasis[:, t, None, None] * values).square().sum(-1)
        cost += kept.repeat(1, 1 << step)
        kept, old = cost.view(len(x), count, 1 << step).min(-1)
        kept -= kept.amin(1, keepdim=True)  # or one far target would take their precision
        olds.append(old)
    j = kept.argmin(1) if ends is None else ends
    path = []
    for old in reversed(olds):
        state = j << step | old.gather(1, j[:, None])[:, 0]
        path.append(state)
        j = state & (count - 1)
    return torch.stack(path[::-1], 1)


def _half_flags() -> tuple[str, ...]:
    """Costs in halves of a word where the processor computes in them."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return ()
    return ("-DBITMILL_HALVES",) if torch.cpu.get_capabilities().get("avx512_fp16") else ()


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled encoder, or None where it cannot be built or BITMILL_CPU_KERNEL is "0"."""
    if os.environ.get("BITMILL_CPU_KERNEL", "1") == "0":
        return None
    library = built(
        "viterbi_cpu.cpp",
        "bitmill_trellis",
        headers=[VECTORS],
        extra_cflags=[
            *("-O3", "-ffinite-math-only", "-fno-signed-zeros", "-fopenmp"),
            *vector_flags(),
            *_half_flags(),
        ],
        extra_ldflags=["-fopenmp"],
    )
    if library is not None:
        pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        library.bitmill_trellis_encode.argtypes = [
            *(pointer, pointer, long, pointer, integer),
            *(integer, pointer, integer),
        ]
        library.bitmill_trellis_encode.restype = None
    return library
