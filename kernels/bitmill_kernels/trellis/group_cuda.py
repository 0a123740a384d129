"""The search for circles on a GPU, through all columns of a group at once (`viterbi_cuda.cu`)."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from bitmill_kernels.trellis.building import CIRCLES, built
from bitmill_kernels.trellis.code import positions, values_per_state
from bitmill_kernels.trellis.layout import SEAM, STATE_BITS, TILE, tile_bytes, tile_count

PAIRS = {1: (1,), 2: (1, 2, 3)}
MORE_PAIRS = (1, 2, 3, 6)
"""Pairs of tiles that a block may search for together, by rate: as many as shared memory holds, and
as `by_pairs` of viterbi_cuda.cu lists them."""

VALUES_WORK = 1.6
"""What the values of all states take, in what the costs of a pair take."""

THREADS = 512

SCRATCH_BYTES = 1 << 31
"""Of kept costs that a search holds at once."""


def available() -> bool:
    """Whether the kernel is there or can be compiled."""
    return load_library() is not None


def encode_tiles(targets: Tensor, rate: int, emphasis: Tensor) -> Tensor:
    """Circles u8 [T, 32 rate] for targets f32 [T, 256], in the sequence of the circle, and the
    emphasis f32 [T, 16] of their rows."""
    block = torch.empty_like(targets, dtype=torch.float32)
    block[:, positions(targets.device)] = targets.float()
    numbers = torch.arange(len(targets), dtype=torch.int32, device=targets.device)
    block = block.view(-1, TILE)
    step = torch.ones_like(block[:, 0])
    return search(block, step, emphasis.flatten(), None, block, numbers, rate)[:, 0]


def search(
    block: Tensor,
    step: Tensor,
    emphasis: Tensor,
    feedback: tuple[Tensor, Tensor] | None,
    missed: Tensor,
    tiles: Tensor,
    rate: int,
) -> Tensor:
    """Circles u8 [T, ceil(c / 16), 32 rate] of some rows of tiles, i32 [T], of a block f32 [M, c].

    step, emphasis, feedback: as in `group.py`; with feedback the rows of `block` are changed and
    those of `missed` f32 [M, c] filled. Both are contiguous.
    """
    columns = block.shape[1]
    circles = torch.empty(
        (len(tiles), tile_count(columns), tile_bytes(rate)), dtype=torch.uint8, device=block.device
    )
    if not len(tiles):
        return circles
    V = values_per_state(rate)
    kept = 1 << STATE_BITS - rate * V
    pairs = pairs_together(len(tiles), rate, kept, _processors(block.device))
    of_pair = 4 * kept * (TILE * TILE // V)
    blocks = max(1, SCRATCH_BYTES // (pairs * of_pair))
    blocks = min(blocks, -(-len(tiles) // (2 * pairs)))
    scratch = torch.empty(blocks * pairs * of_pair, dtype=torch.uint8, device=block.device)
    step, emphasis = step.float().contiguous(), emphasis.float().contiguous()
    library = load_library()
    assert library is not None
    upper, inverses = feedback or (None, None)
    if upper is not None and inverses is not None:
        upper, inverses = upper.contiguous(), inverses.contiguous()
    most = 2 * pairs * blocks
    with torch.cuda.device(block.device):
        stream = torch.cuda.current_stream().cuda_stream
        for part, into in zip(tiles.split(most), circles.split(most), strict=True):
            error = library.bitmill_trellis_encode_cuda(
                block.data_ptr(),
                step.data_ptr(),
                emphasis.data_ptr(),
                None if upper is None else upper.data_ptr(),
                columns,
                None if inverses is None else inverses.data_ptr(),
                missed.data_ptr(),
                part.data_ptr(),
                len(part),
                columns,
                rate,
                SEAM[rate],
                pairs,
                scratch.data_ptr(),
                into.data_ptr(),
                stream,
            )
            if error:
                raise RuntimeError(f"the trellis search failed with CUDA error {error}")
    return circles


def pairs_together(tiles: int, rate: int, kept: int, processors: int) -> int:
    """Pairs of tiles of a block with which the slowest processor is done first.

    kept: costs of a step, each of a thread; where they are few, several blocks share a processor.
    """
    places = processors * max(1, THREADS // kept)

    def work(pairs: int) -> float:
        return -(-tiles // (2 * pairs * places)) * (VALUES_WORK + pairs)

    return min(PAIRS.get(rate, MORE_PAIRS), key=work)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled search, or None where it cannot be built."""
    library = built(
        "viterbi_cuda.cu",
        "bitmill_trellis_cuda",
        headers=[CIRCLES],
        extra_cuda_cflags=["-O3", "-std=c++17"],
    )
    if library is not None:
        pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        library.bitmill_trellis_encode_cuda.argtypes = [
            *(pointer, pointer, pointer, pointer, long, pointer, pointer, pointer),
            *(integer, integer, integer, integer, integer, pointer, pointer, pointer),
        ]
    return library
