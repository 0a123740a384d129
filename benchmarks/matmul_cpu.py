"""Decode speed of packed linears on a CPU against fp32 `F.linear`.

    OMP_NUM_THREADS=2 python benchmarks/matmul_cpu.py [--rows 4096] [--columns 4096] [--out FILE]

In every round each product runs once, so all see the same neighbours, and at 4096x4096 the others
push its weights out of the caches. Medians and smallest times of 200 rounds; the ratios are those
of the packed product to `F.linear`. Where other programs want the same cores, a product waits for
the core that its second thread lost, up to ten times its own time: trust the medians only where
they are near the smallest times.
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

ROUNDS = 200
WARM_UP = 5


def random_linear(N: int, K: int, width: int) -> MixedLinear:
    widths = (width,) * -(-K // 128)
    shapes = code_tensor_shapes(N, K, widths) | zero_tensor_shapes(N, widths)
    tensors = {
        name: torch.randint(0, 256, shape, dtype=torch.uint8) for name, shape in shapes.items()
    }
    tensors["scales"] = torch.rand(len(widths), N).half()
    return MixedLinear([PackedWeight(tensors, widths, N, K)], torch.device("cpu"))


def milliseconds(calls: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
    """(median, smallest) time of each, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
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
    x, dense = torch.randn(1, K), torch.randn(N, K)
    calls: dict[str, Callable[[], object]] = {
        "fp32 F.linear": partial(torch.nn.functional.linear, x, dense)
    }
    calls |= {f"{width}-bit": partial(random_linear(N, K, width), x) for width in WIDTHS}
    found = milliseconds(calls)
    facts = {
        "shape": f"{N}x{K}",
        "tokens": 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "compiled kernel": load_library() is not None,
        "load average": round(os.getloadavg()[0], 1),
    }
    base = found["fp32 F.linear"]
    lines = ["# CPU", "", f"`{json.dumps(facts)}`", ""]
    lines += ["| product | median ms | ratio | smallest ms | ratio |", "|---|---|---|---|---|"]
    for name, (median, smallest) in found.items():
        ratios = f"{base[0] / median:.2f}", f"{base[1] / smallest:.2f}"
        lines.append(f"| {name} | {median:.2f} | {ratios[0]} | {smallest:.2f} | {ratios[1]} |")
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
