"""Distortion of trellis codes on a unit Gaussian, for the choice of a code of a packed format.

    python benchmarks/trellis_codes.py --out benchmarks/results/trellis-codes.md

A value is a fixed function of the L bits of a bit stream that end with it (bitshift trellis, QTIP,
arXiv 2406.11235), V values a state, `rate` bits a value. Functions, of h = state * C mod 2^32:

    halves   the two 16-bit halves of h as fp16 numbers f: sign, two exponent bits, mantissa
             (mask 0x8fff, then xor 0x3b60)
    sums     f(halves of h) + f(halves of h with its bytes reversed); V = 1: the halves' sum
    cubic    ten upper bits of each half as a uniform number u, then u (a + b u^2 + c u^4)
    random   independent Gaussian numbers: what no function of two or three instructions beats

Distortion is the mean squared error at the best scale of the code, over sequences with a free start
that is not counted; `carried` sequences are cut into chunks that start where the one before ended.
The bound is 4^-rate. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.cpp_extension import load

SCALES = (0.88, 0.94, 1.0, 1.05, 1.1, 1.15, 1.2)
SEQUENCES, VALUES = 1024, 256
MULTIPLIERS = 400
BYTES_REVERSED = (3, 2, 1, 0)


class Encoder:
    """The search over all states, on one device."""

    def __init__(self) -> None:
        source = str(Path(__file__).with_name("trellis_codes.cu"))
        self._library = load("trellis_codes", [source], extra_cuda_cflags=["-O3"])
        self._choices = torch.empty(6 << 30, dtype=torch.uint8, device="cuda")
        draw = torch.Generator("cuda").manual_seed(0)
        self._values = torch.randn(SEQUENCES, VALUES, device="cuda", generator=draw)

    def distortion(
        self, table: np.ndarray, L: int, rate: int, scales: Sequence[float] = SCALES, chunk: int = 0
    ) -> tuple[float, float]:
        """Least mean squared error and its scale; table f32 [2^L, V], brought to unit variance."""
        code, V = torch.from_numpy(table.astype(np.float32)).cuda(), table.shape[1]
        code = (code - code.mean()) / code.std()
        values = self._values if not chunk else self._values.view(SEQUENCES // 8, -1)
        errors = torch.empty(len(values), device="cuda")
        steps = chunk or values.shape[1] // V
        found = []
        for scale in scales:
            scaled = (code * scale).contiguous()
            self._library.encode(L, rate * V, V, values, scaled, steps, self._choices, errors)
            found.append((float(errors.double().sum() / values.numel()), scale))
        return min(found)


def hashed(L: int, multiplier: int) -> np.ndarray:
    """h of every state, u32 [2^L]."""
    states = np.arange(1 << L, dtype=np.uint64)
    return (states * np.uint64(multiplier) & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def as_halves(h: np.ndarray) -> np.ndarray:
    """f of both halves, f32 [2^L, 2]."""
    parts = np.stack([h & 0xFFFF, h >> 16], 1).astype(np.uint16)
    return ((parts & 0x8FFF) ^ 0x3B60).view(np.float16).astype(np.float32)


def halves(L: int, multiplier: int) -> np.ndarray:
    """See above; f32 [2^L, 2]."""
    return as_halves(hashed(L, multiplier))


def sums(
    L: int, multiplier: int, V: int = 2, order: tuple[int, ...] = BYTES_REVERSED
) -> np.ndarray:
    """See above; f32 [2^L, V]."""
    h = hashed(L, multiplier)
    if V == 1:
        both: np.ndarray = as_halves(h).sum(1, keepdims=True)
        return both
    moved = np.zeros_like(h)
    for i, b in enumerate(order):
        moved |= ((h >> np.uint32(8 * b)) & 255) << np.uint32(8 * i)
    summed: np.ndarray = as_halves(h) + as_halves(moved)
    return summed


def cubic(L: int, multiplier: int, a: float, b: float, c: float) -> np.ndarray:
    """See above; f32 [2^L, 2]."""
    h = hashed(L, multiplier)
    parts = np.stack([(h >> 6) & 1023, h >> 22], 1).astype(np.float32)
    u = (parts + 0.5) / 512 - 1
    return u * (a + b * u**2 + c * u**4)


def random(L: int, V: int) -> np.ndarray:
    """See above; f32 [2^L, V]."""
    return np.random.default_rng(0).standard_normal((1 << L, V)).astype(np.float32)


def best_multiplier(encoder: Encoder) -> tuple[int, list[str]]:
    """The multiplier of `sums` whose distortions at rates 2, 3 and 4 are lowest together."""
    draw = np.random.default_rng(1)
    tried = []
    for _ in range(MULTIPLIERS):
        multiplier = int(draw.integers(1 << 20, 1 << 32)) | 1
        table = sums(16, multiplier)
        found = [
            encoder.distortion(table, 16, rate, (scale,))[0]
            for rate, scale in ((2, 1.05), (3, 1.1), (4, 1.15))
        ]
        together = sum(d * 4**rate for d, rate in zip(found, (2, 3, 4), strict=True))
        tried.append((together, multiplier, found))
    tried.sort()
    lines = [f"| {m:#x} | " + " | ".join(f"{d:.5f}" for d in f) + " |" for _, m, f in tried[:5]]
    worst = tried[-1]
    lines.append(f"| {worst[1]:#x} (worst) | " + " | ".join(f"{d:.5f}" for d in worst[2]) + " |")
    return tried[0][1], lines


def main() -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    encoder = Encoder()
    multiplier, found = best_multiplier(encoder)
    rows = []

    def row(name: str, table: np.ndarray, L: int, rates: Sequence[int]) -> None:
        cells = {rate: f"{encoder.distortion(table, L, rate)[0]:.5f}" for rate in rates}
        values = " | ".join(cells.get(rate, "") for rate in range(1, 9))
        rows.append(f"| {name} | {L} | {table.shape[1]} | {values} |")
        print(rows[-1], flush=True)

    pairs, single = (1, 2, 3, 4), (2, 3, 4, 5, 6, 7, 8)
    bound = " | ".join(f"{4.0**-rate:.5f}" for rate in range(1, 9))
    rows.append(f"| bound |  |  | {bound} |")
    row("random", random(16, 2), 16, pairs)
    row("random", random(14, 2), 14, pairs)
    row("random", random(16, 1), 16, single)
    row(f"sums {multiplier:#x}", sums(16, multiplier), 16, pairs)
    row(f"sums {multiplier:#x}", sums(14, multiplier), 14, pairs)
    row(f"sums {multiplier:#x}", sums(16, multiplier, 1), 16, single)
    for order in ((1, 0, 3, 2), (1, 2, 3, 0), (3, 0, 1, 2)):
        row(f"sums, bytes {order}", sums(16, multiplier, 2, order), 16, pairs)
    row("halves", halves(16, multiplier), 16, pairs)
    for a, b, c in ((1.0, 0.0, 0.0), (1.2, 0.3, 1.5), (1.2, -0.5, 2.5)):
        row(f"cubic {a} {b} {c}", cubic(16, multiplier, a, b, c), 16, pairs)
    carried = []
    for chunk in (1024, 256, 128, 64, 32, 16):
        cells = [
            f"{encoder.distortion(sums(16, multiplier), 16, rate, (s,), chunk)[0]:.5f}"
            for rate, s in ((2, 1.05), (3, 1.1), (4, 1.15))
        ]
        carried.append(f"| {chunk} | " + " | ".join(cells) + " |")
        print(carried[-1], flush=True)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    text = f"""# Trellis codes on a unit Gaussian
`python benchmarks/trellis_codes.py`, {torch.cuda.get_device_name()}, {versions}.
{SEQUENCES} sequences of {VALUES} values; the standard error of a figure is about 0.3 %.

| function | L | V | {" | ".join(f"rate {rate}" for rate in range(1, 9))} |
|---|---|---|{"---|" * 8}
{chr(10).join(rows)}

Multipliers of `sums`, best and worst of {MULTIPLIERS}:

| multiplier | rate 2 | rate 3 | rate 4 |
|---|---|---|---|
{chr(10).join(found)}

Sequences of 1024 steps in chunks that are decided one by one, each from where the last one ended:

| steps a chunk | rate 2 | rate 3 | rate 4 |
|---|---|---|---|
{chr(10).join(carried)}
"""
    options.out.write_text(text)


if __name__ == "__main__":
    main()
