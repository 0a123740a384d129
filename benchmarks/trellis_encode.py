"""Weights a second that the search for trellis codes takes, by rate and number of tiles.

    PYTHONPATH=kernels python benchmarks/trellis_encode.py --device cuda

One call encodes one column of tiles: 256 tiles are the 4096 rows of a 7B output projection, 768 its
q, k and v, 1376 its gate and up. Medians of 5 calls.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from bitmill_kernels.trellis.code import DEVIATION
from bitmill_kernels.trellis.encode import encode_tiles
from bitmill_kernels.trellis.layout import RATES


def seconds(targets: torch.Tensor, rate: int) -> float:
    """Median of one call."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        encode_tiles(targets, rate)
        if targets.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiles", type=int, nargs="+", default=[256, 768, 1376, 3584])
    options = parser.parse_args()
    for rate in RATES:
        for count in options.tiles:
            x = torch.randn(count, 256, device=options.device) * DEVIATION[rate]
            taken = seconds(x, rate)
            each = x.numel() / taken
            print(f"rate {rate}, {count} tiles: {taken * 1e3:.2f} ms, {each / 1e6:.1f} M weights/s")


if __name__ == "__main__":
    main()
