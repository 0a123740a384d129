"""Distortion of the stored trellis code on Gaussian numbers, tile by tile, as encoded and decoded.

    python benchmarks/trellis_distortion.py --out benchmarks/results/trellis-distortion.md

For every rate: the deviation of the numbers that the code fits best, the mean squared error there
over their variance, and the bound 4^-rate. `kernels/bitmill_kernels/trellis/code.py` holds both.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch

from bitmill_kernels.trellis.code import decode_tiles, in_sequence, table
from bitmill_kernels.trellis.encode import encode_tiles
from bitmill_kernels.trellis.layout import RATES

RATIOS = np.linspace(0.80, 1.06, 14)
"""Deviations that are tried, in those of the code's own values."""


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiles", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    draw = torch.Generator(options.device).manual_seed(0)
    x = torch.randn(options.tiles, 256, generator=draw, device=options.device)
    rows = [
        "| rate | bound | distortion | over the bound | deviation | µs a weight |",
        "|---|---|---|---|---|---|",
    ]
    for rate in RATES:
        own = float(table(rate, x.device).std())
        errors, seconds = [], time.perf_counter()
        for ratio in RATIOS:
            decoded = in_sequence(decode_tiles(encode_tiles(x * own * ratio, rate), rate))
            errors.append(float((decoded.float() / (own * ratio) - x).square().double().mean()))
        seconds = (time.perf_counter() - seconds) / x.numel() / len(RATIOS)
        best = int(np.argmin(errors))
        near = slice(max(0, best - 2), best + 3)
        a, b, c = np.polyfit(RATIOS[near], errors[near], 2)
        ratio, error = -b / (2 * a), c - b * b / (4 * a)
        bound = 4.0**-rate
        rows.append(
            f"| {rate} | {bound:.6f} | {error:.6f} | {error / bound:.3f} | {ratio * own:.4f} "
            f"| {seconds * 1e6:.2f} |"
        )
        print(rows[-1], flush=True)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    text = "\n".join(rows)
    if options.out:
        options.out.write_text(
            f"# Distortion of the stored trellis code\n`benchmarks/trellis_distortion.py --tiles "
            f"{options.tiles} --device {options.device}`, {versions}.\n"
            f"{options.tiles} circles of 256 values.\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
