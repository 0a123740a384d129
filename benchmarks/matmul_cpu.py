"""Decode speed of packed linears on a CPU against fp32 `F.linear`.

    python benchmarks/matmul_cpu.py [--threads 2] [--rows 4096] [--columns 4096]

Prints the smallest time of many calls: on a shared machine the others measure its neighbours.
Weights of every width are rotated through copies larger than the last-level cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from bitmill_kernels.layout import WIDTHS, code_tensor_shapes, zero_tensor_shapes
from bitmill_kernels.linear import MixedLinear
from bitmill_kernels.runtime import PackedWeight

ROTATION_BYTES = 96 << 20
CALLS = 150


def random_linear(N: int, K: int, width: int) -> MixedLinear:
    widths = (width,) * -(-K // 128)
    shapes = code_tensor_shapes(N, K, widths) | zero_tensor_shapes(N, widths)
    tensors = {
        name: torch.randint(0, 256, shape, dtype=torch.uint8) for name, shape in shapes.items()
    }
    tensors["scales"] = torch.rand(len(widths), N).half()
    return MixedLinear([PackedWeight(tensors, widths, N, K)], torch.device("cpu"))


def milliseconds(call: Callable[[int], object]) -> float:
    call(0)
    times = []
    for i in range(CALLS):
        start = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    N, K = options.rows, options.columns
    x = torch.randn(1, K)
    dense = [torch.randn(N, K) for _ in range(ROTATION_BYTES // (4 * N * K) + 2)]
    base = milliseconds(lambda i: torch.nn.functional.linear(x, dense[i % len(dense)]))
    print(f"{N}x{K}, 1 token, {options.threads} threads, torch {torch.__version__}")
    print(f"fp32 F.linear  {base:7.2f} ms")
    for width in WIDTHS:
        count = min(24, ROTATION_BYTES * 8 // (width * N * K) + 2)
        packed = [random_linear(N, K, width) for _ in range(count)]
        took = milliseconds(lambda i, packed=packed: packed[i % len(packed)](x))
        print(f"{width}-bit          {took:7.2f} ms  {base / took:5.2f}x")


if __name__ == "__main__":
    main()
