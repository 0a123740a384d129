"""Error of the stored trellis code on Gaussian numbers of deviations that it does not fit best.

    python benchmarks/trellis_sizes.py --out benchmarks/results/trellis-sizes.md

For every rate the mean squared error of encoded and decoded tiles, over `DEVIATION`^2, at
deviations of 2^-2 to 2^3 times `DEVIATION` in steps of 2^(1/4).
`kernels/bitmill_kernels/trellis/errors.py` holds the table.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

from bitmill_kernels.trellis.code import DEVIATION, decode_tiles, in_sequence
from bitmill_kernels.trellis.encode import encode_tiles
from bitmill_kernels.trellis.errors import SIZES
from bitmill_kernels.trellis.layout import RATES


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiles", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    draw = torch.Generator(options.device).manual_seed(0)
    x = torch.randn(options.tiles, 256, generator=draw, device=options.device)
    rows = [
        f"| size | {' | '.join(f'rate {rate}' for rate in RATES)} |",
        f"|---{'|---' * len(RATES)}|",
    ]
    for size in SIZES:
        errors = []
        for rate in RATES:
            wanted = x * (DEVIATION[rate] * size)
            found = in_sequence(decode_tiles(encode_tiles(wanted, rate), rate)).float()
            errors.append(float((found - wanted).square().double().mean()) / DEVIATION[rate] ** 2)
        rows.append(f"| {size:.3f} | {' | '.join(f'{error:.3e}' for error in errors)} |")
        print(rows[-1], flush=True)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    text = "\n".join(rows)
    if options.out:
        options.out.write_text(
            f"# Error of the stored trellis code by the size of what is coded\n"
            f"`benchmarks/trellis_sizes.py --tiles {options.tiles} --device {options.device}`, "
            f"{versions}.\n{options.tiles} circles of 256 Gaussian values; size: their deviation "
            f"over that which the rate fits best; mean squared error in units of the latter.\n\n"
            f"{text}\n"
        )


if __name__ == "__main__":
    main()
