"""Decode speed of packed linears on a CPU against fp32 `F.linear`.

    OMP_NUM_THREADS=2 python benchmarks/matmul_cpu.py [--rows 4096] [--columns 4096] [--out FILE]

1, 4 and 8 tokens, beside dense weights in fp32 and bf16. In every round each product runs once, so
all see the same neighbours, and at 4096x4096 the others push its weights out of the caches. Medians
and smallest times of 60 rounds; the ratios are those of fp32 `F.linear` to the product at as many
tokens, and of the product's smallest time at 4 tokens to that at 1. Where other programs want the
same cores, a product waits for the core that its second thread lost, up to ten times its own time:
trust the medians only where they are near the smallest times.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bitmill_kernels.layout import WIDTHS, code_tensor_shapes, zero_tensor_shapes
from bitmill_kernels.matmul.cpu import load_library
from bitmill_kernels.matmul.linear import MixedLinear
from bitmill_kernels.matmul.runtime import PackedWeight

ROUNDS = 60
WARM_UP = 3
TOKENS = (1, 4, 8)


def random_linear(N: int, K: int, width: int) -> MixedLinear:
    widths = (width,) * -(-K // 128)
    shapes = code_tensor_shapes(N, K, widths) | zero_tensor_shapes(N, widths)
    tensors = {
        name: torch.randint(0, 256, shape, dtype=torch.uint8) for name, shape in shapes.items()
    }
    tensors["scales"] = torch.rand(len(widths), N).half()
    return MixedLinear([PackedWeight(tensors, widths, N, K)], torch.device("cpu"))


Product = tuple[str, int]
"""A name and the number of tokens."""


def milliseconds(
    calls: dict[Product, Callable[[], object]],
) -> dict[Product, tuple[float, float]]:
    """(median, smallest) time of each, run in turn."""
    times: dict[Product, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP + ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    kept = {name: sorted(found[WARM_UP:]) for name, found in times.items()}
    return {name: (found[ROUNDS // 2], found[0]) for name, found in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    N, K = options.rows, options.columns
    dense = torch.randn(N, K)
    packed = {f"{width}-bit": random_linear(N, K, width) for width in WIDTHS}
    calls: dict[Product, Callable[[], object]] = {}
    for count in TOKENS:
        x = torch.randn(count, K)
        calls["fp32", count] = partial(torch.nn.functional.linear, x, dense)
        calls["bf16", count] = partial(torch.nn.functional.linear, x.bfloat16(), dense.bfloat16())
        calls |= {(name, count): partial(linear, x) for name, linear in packed.items()}
    found = milliseconds(calls)
    facts = {
        "shape": f"{N}x{K}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "compiled kernel": load_library() is not None,
        "load average": round(os.getloadavg()[0], 1),
    }
    heads = [f"{count}: median ms, smallest ms, ratio" for count in TOKENS]
    lines = ["# CPU", "", f"`{json.dumps(facts)}`", ""]
    lines += [f"| product | {' | '.join(heads)} | 4 over 1 |", "|---" * (len(TOKENS) + 2) + "|"]
    for name in dict.fromkeys(name for name, _ in calls):
        cells = []
        for count in TOKENS:
            median, smallest = found[name, count]
            ratio = found["fp32", count][1] / smallest
            cells.append(f"{median:.2f}, {smallest:.2f}, {ratio:.2f}")
        growth = found[name, 4][1] / found[name, 1][1]
        lines.append(f"| {name} | {' | '.join(cells)} | {growth:.2f} |")
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
