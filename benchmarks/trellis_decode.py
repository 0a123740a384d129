"""Microseconds of a linear in trellis codes beside fp16 `F.linear`, in CUDA graphs.

    PYTHONPATH=kernels python benchmarks/trellis_decode.py
    PYTHONPATH=kernels python benchmarks/trellis_decode.py --together
    PYTHONPATH=kernels:WHEEL python benchmarks/trellis_decode.py --peers   beside EXL3's kernels

Every shape of the decode and batch kernels and decoded rows (`--shapes`), or what a linear would
run. Rates 2, 3, 4, 3 in turn (3 bits), and each alone for one token. With `--together` the linears
of a block that share an input, multiplied together and one by one. A graph holds 20 calls; weights
are rotated through at least 220 MB, so that no call finds its own in a cache. Both are
replayed in turn; medians of 15. With `--peers` every rate is timed for all tokens, beside EXL3's
linear of its average rate (`exl3_kernels.py`); both rotate inputs that come as a layer has them.
Where EXL3 is not there, fails or is wrong, a line says why.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import matmul_peers
import torch
from torch import Tensor
from torch.nn import functional

from bitmill_kernels.trellis import batch_cuda, decode_cuda
from bitmill_kernels.trellis.layout import circle_shapes
from bitmill_kernels.trellis.product import TrellisWeight
from bitmill_kernels.trellis.product_cuda import CudaTrellisProduct

SHAPES = ((4096, 4096), (11008, 4096), (28672, 8192))
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
BLOCKS = {
    "7B q/k/v": ((4096, 4096, 4096), 4096),
    "8B q/k/v": ((4096, 1024, 1024), 4096),
    "7B gate/up": ((11008, 11008), 4096),
    "70B q/k/v": ((8192, 1024, 1024), 8192),
    "70B gate/up": ((28672, 28672), 8192),
}
"""Rows and columns of linears that share an input."""
MIXES = {"2343": (2, 3, 4, 3), "2": (2,), "3": (3,), "4": (4,)}
CALLS, ROTATED = 20, 220e6
Products = Sequence[Callable[[Tensor], Tensor]]


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of these calls."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(graphs: list[torch.cuda.CUDAGraph]) -> list[float]:
    """Of one call of each graph."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(15):
        for graph, own in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            own.append(start.elapsed_time(end) * 1e3 / CALLS)
    return [median(own) for own in times]


def weight(N: int, K: int, rates: tuple[int, ...]) -> TrellisWeight:
    """Random circles; speed depends on no value."""
    device = torch.device("cuda")
    circles = {
        key: torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        for key, shape in circle_shapes(N, K, rates).items()
    }
    rows, groups = (torch.ones(n, dtype=torch.float16, device=device) for n in (N, len(rates)))
    return TrellisWeight(circles, rows, groups, rates)


def product(weights: list[TrellisWeight], K: int, order: Tensor) -> CudaTrellisProduct:
    """Of linears that share their input."""
    device = torch.device("cuda")
    return CudaTrellisProduct(weights, K, device, order=order, inputs=lambda x: x)


def linear(N: int, K: int, rates: tuple[int, ...]) -> CudaTrellisProduct:
    """A product of one linear."""
    return product([weight(N, K, rates)], K, torch.randperm(K, device="cuda").int())


def one_by_one(products: list[CudaTrellisProduct], x: Tensor) -> None:
    """What linears of one input take without each other."""
    for one in products:
        one.of_source(x)


def measure_together(tokens: list[int]) -> None:
    """Linears of a block that share an input, together and one by one."""
    for name, (outputs, K) in BLOCKS.items():
        groups = K // 128
        rates = (MIXES["2343"] * groups)[:groups]
        count = max(2, int(ROTATED / (sum(outputs) * K * 3 / 8)) + 1)
        together, alone = [], []
        for _ in range(min(count, CALLS)):
            weights = [weight(N, K, rates) for N in outputs]
            order = torch.randperm(K, device="cuda").int()
            together.append(product(weights, K, order))
            alone.append([product([one], K, order) for one in weights])
        for T in tokens:
            x = torch.randn(T, K, dtype=torch.float16, device="cuda")
            stacked, single = microseconds(
                [
                    graph_of(
                        [partial(together[i % len(together)].of_source, x) for i in range(CALLS)]
                    ),
                    graph_of([partial(one_by_one, alone[i % len(alone)], x) for i in range(CALLS)]),
                ]
            )
            print(
                f"{name} {'+'.join(map(str, outputs))}x{K}, {T} tokens: together {stacked:.1f} us, "
                f"one by one {single:.1f} us, {single / stacked:.2f} times",
                flush=True,
            )


def products(linears: list[CudaTrellisProduct], tokens: int, every: bool) -> dict[str, Products]:
    """By name, one product for each linear."""
    if not every:
        return {"": [one.of_source for one in linears]}
    found: dict[str, Products] = {}
    if tokens <= max(decode_cuda.LAUNCHES):
        for shape in decode_cuda.SHAPES:
            found[f"{shape.rows} rows"] = [one.decode(shape) for one in linears]
        return found
    tile = next((one for one in batch_cuda.SHAPES if one >= tokens), max(batch_cuda.SHAPES))
    for wide in batch_cuda.SHAPES[tile]:
        name = f"{wide.groups}g {tile}t"
        found[name] = [one.batch({tile: wide}) for one in linears]
    found["decoded rows"] = [one.by_decoded_rows for one in linears]
    return found


def peer(
    N: int, K: int, name: str, tokens: list[int]
) -> tuple[matmul_peers.Peer | None, dict[int, str]]:
    """EXL3's linear of the average rate of a mix, and by tokens why it is not timed."""
    mix = MIXES[name]
    try:
        found = matmul_peers.exl3(N, K, sum(mix) // len(mix), int(ROTATED))
    except Exception as error:  # noqa: BLE001  (foreign code may raise anything)
        return None, dict.fromkeys(tokens, matmul_peers.reason(error))
    return found, matmul_peers.faults(found, K, tokens)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", action="store_true")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--linears", nargs="+", default=[f"{N}x{K}" for N, K in SHAPES])
    parser.add_argument("--rates", choices=list(MIXES), nargs="+", default=list(MIXES))
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    if options.together:
        measure_together(options.tokens)
        return
    for N, K in [map(int, name.split("x")) for name in options.linears]:
        groups = K // 128
        for name in options.rates:
            mix = MIXES[name]
            rates = (mix * groups)[:groups]
            count = max(2, int(ROTATED / (N * K * sum(mix) / len(mix) / 8)) + 1)
            ours = [linear(N, K, rates) for _ in range(min(count, CALLS))]
            dense = [torch.randn(N, K, dtype=torch.float16, device="cuda") for _ in range(4)]
            counts = options.tokens if options.peers or name == "2343" else [1]
            exl3, faults = peer(N, K, name, counts) if options.peers else (None, {})
            for tokens in counts:
                x = torch.randn(tokens, K, dtype=torch.float16, device="cuda")
                found = products(ours, tokens, options.shapes)
                if tokens in faults:
                    print(f"{N}x{K} rates {name}, {tokens} tokens exl3: {faults[tokens]}")
                elif exl3 is not None:
                    found[exl3.name] = exl3.calls
                graphs = [
                    graph_of([partial(functional.linear, x, dense[i % 4]) for i in range(CALLS)]),
                    *(
                        graph_of([partial(own[i % len(own)], x) for i in range(CALLS)])
                        for own in found.values()
                    ),
                ]
                fp16, *times = microseconds(graphs)
                for kernel, time in zip(found, times, strict=True):
                    print(
                        f"{N}x{K} rates {name}, {tokens} tokens {kernel}: {time:.1f} us, "
                        f"fp16 {fp16:.1f} us, {fp16 / time:.2f} times",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
