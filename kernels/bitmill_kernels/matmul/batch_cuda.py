"""Launching of the CUDA kernel for many tokens (`batch_cuda.cu`), by the tables of `units.py`.

Weights are rounded once to half precision before they are multiplied, as a dequantized weight is;
the decode kernels round nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bitmill_kernels.hopper.launch import Launch, launches_for
from bitmill_kernels.hopper.schedule import Rings, WarpgroupShape, plan_rings, whole_tiles
from bitmill_kernels.matmul.cuda_library import load_library
from bitmill_kernels.matmul.runtime import RuntimeWeight
from bitmill_kernels.matmul.units import build_schedule, divides_rows

SHAPES = {
    32: (WarpgroupShape(4), WarpgroupShape(2)),
    64: (WarpgroupShape(4), WarpgroupShape(2)),
    128: (WarpgroupShape(2),),
    256: (WarpgroupShape(2),),
}
"""The shapes that are compiled, by tokens of a launch, as listed at the end of `batch_cuda.cu`,
from more to fewer rows. With 256 tokens there is room for widths up to 4."""

ROWS_A_TOKEN = 128
"""Outputs for each token of a launch from which blocks of more rows pay."""


def by_preference(N: int, tokens: int) -> Sequence[WarpgroupShape]:
    """The shapes for so many tokens a launch, the fastest first.

    Fewer rows mean fewer blocks that share a tile and its sums, more rows that activations are read
    less often. Measured on an H200.
    """
    shapes = SHAPES[tokens]
    return shapes if ROWS_A_TOKEN * tokens <= N else shapes[::-1]


def plan(weight: RuntimeWeight, shape: WarpgroupShape, tokens: int) -> Rings | None:
    """How a block uses shared memory, or None where it does not fit or tiles do not end with rows.

    tokens: those of a launch, one of `SHAPES`.
    """
    if not divides_rows(weight, shape.rows):
        return None
    widest = max(pair.width for member in weight.members for pair in member.pairs)
    return plan_rings(shape.rows * (8 + 32 * widest), tokens, 2)


class CudaBatch:
    """y [T, N] = x W^T for any number of tokens with the compiled kernel."""

    def __init__(self, weight: RuntimeWeight, shapes: Mapping[int, WarpgroupShape]) -> None:
        """shapes: by tokens of a launch, ascending; all tables are built here.

        Raises ValueError for a shape that cannot run the weight, RuntimeError or OSError where the
        library cannot be loaded.
        """
        self._library = load_library()
        self._weight = weight
        device = weight.planes.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._launches = {}
        for tokens, shape in shapes.items():
            rings = plan(weight, shape, tokens)
            if rings is None:
                raise ValueError(
                    f"{shape} cannot run {tokens} tokens of N={weight.N}, K={weight.K}: too little "
                    "shared memory, or its tiles do not divide the padded rows"
                )
            blocks = whole_tiles(sum(one.rows for one in weight.members) // shape.rows, processors)
            schedule = build_schedule(weight, shape.rows, blocks, None)
            self._launches[tokens] = Launch(schedule.units, shape, rings, tokens, device)
        self._pairs = torch.from_numpy(schedule.pairs).to(device)  # the same in all launches

    def __call__(self, x: Tensor, bias: Tensor | None, y: Tensor, *, overlap: bool = True) -> None:
        """x f16 or bf16 [T, K] with contiguous rows, y of its dtype [T, N] contiguous.

        overlap: let the launch begin while the one before it on the stream drains.
        """
        weight = self._weight
        for rows, launch in launches_for(self._launches, len(x)):
            launch(
                self._library.bitmill_batch,
                x[rows],
                y[rows],
                weight.K,
                groups=2 * weight.pair_count,
                scaled=x.dtype == torch.bfloat16,
                overlap=overlap,
                planes=weight.planes.data_ptr(),
                grid=weight.grid.data_ptr(),
                pairs=self._pairs.data_ptr(),
                order=None if weight.order is None else weight.order.data_ptr(),
                bias=None if bias is None else bias.data_ptr(),
                pair_count=weight.pair_count,
            )
