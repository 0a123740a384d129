"""Speed of the packed product against fp16 `F.linear`, in one run on one GPU.

    python benchmarks/matmul.py                 check, then the table
    python benchmarks/matmul.py --sweep         every launch shape of the CUDA kernel
    python benchmarks/matmul.py --sweep --write also put the best shapes into tiles.json
    (`matmul_triton.py` for Triton's, `matmul_tiles.py` for those of a record)
    python benchmarks/matmul.py --kernels batch what linears run at 3 to 2048 tokens
    python benchmarks/matmul.py --kernels batch --peers   and those of `matmul_peers.py`
    python benchmarks/matmul.py --kernels cuda  leave Triton, batches and prefill out

Every product is timed inside a CUDA graph of 40 calls, its weights rotated through copies that
exceed the L2 cache several times; the median of 7 replays counts. Prefill and its fp16 twin are
replayed in turn, so both see the same clocks. The activation prologue is part of every time.
Results go to benchmarks/results/ (or --out) as JSON and markdown with the versions, after every
case. A kernel that fails the check is not timed, and the exit code is 1. A peer is not timed where
its product fails, is wrong or cannot run in a graph, and is named with the reason under `absent`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matmul_peers
import matmul_tiles
import torch
import triton

from bitmill_kernels.hopper.schedule import WarpgroupShape
from bitmill_kernels.layout import WIDTHS, code_tensor_shapes, zero_tensor_shapes
from bitmill_kernels.matmul import batch_cuda, cuda_library, tiles
from bitmill_kernels.matmul.batch_cuda import CudaBatch
from bitmill_kernels.matmul.decode_cuda import (
    MAX_FUSED_TOKENS,
    SHAPES,
    TOKEN_BUCKETS,
    CudaDecoder,
    DecodeShape,
)
from bitmill_kernels.matmul.decode_triton import TritonDecoder
from bitmill_kernels.matmul.linear import MixedLinear
from bitmill_kernels.matmul.runtime import (
    PackedWeight,
    RuntimeWeight,
    build_runtime,
    dequantize_runtime,
)

Product = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], None]
"""(x, bias, y) -> None"""
Products = dict[str, Product]
Row = dict[str, Any]

DEVICE = torch.device("cuda")
ROTATION_BYTES = 220 << 20
CALLS = 40
REPLAYS = 7
TOLERANCE = 1e-3
MIX = (3, 2, 4, 3)

CASES: dict[str, tuple[list[int], int, list[tuple[int, ...]]]] = {
    "4096x4096 mix 3": ([4096], 4096, [MIX]),
    "11008x4096 mix 3": ([11008], 4096, [MIX]),
    "4096x11008 mix 3": ([4096], 11008, [MIX]),
    "28672x8192 mix 3": ([28672], 8192, [MIX]),
    "28672x8192 4-bit": ([28672], 8192, [(4,)]),
    "28672x8192 3-bit": ([28672], 8192, [(3,)]),
    "28672x8192 2-bit": ([28672], 8192, [(2,)]),
    "q/k/v 12288x4096 mix 3": ([4096] * 3, 4096, [MIX, (2, 4), (3,)]),
}
TARGETS = {
    "11008x4096 mix 3": 2.6,
    "28672x8192 mix 3": 3.4,
    "28672x8192 4-bit": 3.1,
    "28672x8192 2-bit": 4.5,
    "q/k/v 12288x4096 mix 3": 2.2,
}
TOKENS_TIMED = (1, 16, 32)
TOKENS_SWEPT = (1, 2, 3, 8, 16, 32)
TOKENS_CHECKED = [
    (1, torch.float16),
    (2, torch.bfloat16),
    (5, torch.bfloat16),
    (16, torch.float16),
    (27, torch.float16),
    (48, torch.bfloat16),
    (150, torch.float16),
]
BATCHES = (3, 8, 16, 32, 64, 128, 256, 512, 2048)
MATRICES = (
    (28672, 8192),
    (11008, 4096),
    (4096, 4096),
    (4096, 11008),
    (12288, 4096),
    (8192, 28672),
)
BATCH_CASES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    f"{N}x{K} {name}": (N, K, pattern)
    for N, K in MATRICES
    for name, pattern in (("mix 3", MIX), ("4-bit", (4,)), ("2-bit", (2,)))
}
ASKED_CASES = BATCH_CASES | {
    f"{N}x{K} {width}-bit": (N, K, (width,)) for N, K in MATRICES for width in (1, 3, 5, 6, 8)
}
"""What `--batch` takes: other widths run only where they are named."""
SWEPT = {
    f"{N}x{K} {name}": ([N], K, [pattern])
    for N, K in MATRICES
    for name, pattern in (("mix 3", MIX), *((f"{w}-bit", (w,)) for w in WIDTHS))
} | CASES
UNPRINTED = ("widths", "N", "K", "shape", "converts")
PREFILL = [(4096, 4096), (11008, 4096), (28672, 8192)]
PREFILL_PATTERNS: list[tuple[int, ...]] = [(2,), (3,), (4,), (8,), MIX]


def random_packed(
    N: int, K: int, widths: tuple[int, ...], *, ordered: bool = False
) -> PackedWeight:
    """Random planes on the device: every byte is a legal code."""
    shapes = code_tensor_shapes(N, K, widths) | zero_tensor_shapes(N, widths)
    tensors = {
        name: torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
        for name, shape in shapes.items()
    }
    tensors["scales"] = (torch.rand(len(widths), N, device=DEVICE) * 0.01 + 0.001).half()
    order = torch.randperm(K, device=DEVICE).to(torch.int32) if ordered else None
    return PackedWeight(tensors, widths, N, K, order)


def spread(pattern: tuple[int, ...], K: int) -> tuple[int, ...]:
    groups = -(-K // 128)
    return tuple(pattern[g % len(pattern)] for g in range(groups))


def case_runtime(name: str) -> RuntimeWeight:
    rows, K, patterns = SWEPT[name]
    weights = [
        random_packed(N, K, spread(pattern, K)) for N, pattern in zip(rows, patterns, strict=True)
    ]
    return build_runtime(weights, DEVICE)


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def exact_product(
    x: torch.Tensor, weight: RuntimeWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    inputs = x.double() if weight.order is None else x.double()[:, weight.order.long()]
    y = inputs @ dequantize_runtime(weight).double().t()
    return y if bias is None else y + bias.double()


def products_of(weight: RuntimeWeight, kinds: list[str], T: int) -> Products:
    """Every decoder that can run T tokens, by name."""
    found: Products = {}
    if "triton" in kinds and TOKEN_BUCKETS[-1] >= T:
        found["triton"] = triton_decoder(weight)
    if "cuda" in kinds and TOKEN_BUCKETS[-1] >= T and cuda_library.available(DEVICE):
        for shape in SHAPES[bucket_of(T)]:
            decoder = decoder_or_none(weight, shape, T)
            if decoder is not None:
                found[shape_name(shape)] = decoder
            if decoder is not None and decoder.converts(T):
                apart = dataclasses.replace(shape, fused=0)
                found[shape_name(apart)] = CudaDecoder(weight, {bucket_of(T): apart})
    if "batch" in kinds and cuda_library.available(DEVICE):
        for tile, batch_shapes in batch_cuda.SHAPES.items():
            for batch_shape in batch_shapes:
                if batch_cuda.plan(weight, batch_shape, tile) is not None:
                    found[batch_name(batch_shape, tile)] = CudaBatch(weight, {tile: batch_shape})
    return found


def batch_name(shape: WarpgroupShape, tile: int) -> str:
    return f"batch {shape.groups}g {tile}t"


def bucket_of(T: int) -> int:
    return next(bucket for bucket in TOKEN_BUCKETS if bucket >= T)


def best_shape(weight: RuntimeWeight, bucket: int) -> DecodeShape:
    properties = torch.cuda.get_device_properties(DEVICE)
    shared = properties.shared_memory_per_multiprocessor
    return tiles.block_shapes(weight, properties.name, shared)[bucket]


def triton_decoder(weight: RuntimeWeight) -> TritonDecoder:
    properties = torch.cuda.get_device_properties(DEVICE)
    processors = properties.multi_processor_count
    return TritonDecoder(weight, tiles.triton_tiles(weight, properties.name, processors), asm=True)


def shape_name(shape: DecodeShape) -> str:
    name = f"cuda {shape.warps}w {shape.row_tiles}r {shape.blocks}b"
    if shape.fused == MAX_FUSED_TOKENS:
        return name
    return f"{name} converts {shape.fused}" if shape.fused else f"{name} prologue"


def decoder_or_none(weight: RuntimeWeight, shape: DecodeShape, T: int) -> CudaDecoder | None:
    """None where the shape cannot run the weight."""
    try:
        return CudaDecoder(weight, {bucket_of(T): shape})
    except ValueError:
        return None


def check(kinds: list[str]) -> set[str]:
    """Names of the kernels that fail: fp64 over widths, mixes, tails, orders, tokens; repeated."""
    torch.manual_seed(1)
    if not {"cuda", "triton", "batch"} & set(kinds):
        return set()
    compiled = {"cuda", "batch"} & set(kinds)
    cases: list[tuple[tuple[int, ...], int, int, bool]]
    cases = [((width,) * 4, 320, 512, False) for width in WIDTHS if compiled]
    cases += [
        ((3, 2, 4, 4, 2, 3, 3, 2, 3), 1000, 1100, True),
        (spread(MIX, 4096), 4096, 4096, False),
    ]
    if compiled:
        cases += [((3, 2, 4, 8, 1, 3, 6, 5, 3), 1000, 1100, True), ((3,), 7, 100, True)]
    failed: set[str] = set()
    for widths, N, K, ordered in cases:
        weight = build_runtime([random_packed(N, K, widths, ordered=ordered)], DEVICE)
        for T, dtype in TOKENS_CHECKED:
            x = (torch.randn(T, K, device=DEVICE) + 0.5).to(dtype)
            bias = torch.randn(N, device=DEVICE).to(dtype)
            exact = exact_product(x, weight, bias)
            for name, product in products_of(weight, kinds, T).items():
                if not check_product(f"{name} {widths[:9]} T={T}", product, x, bias, exact):
                    failed.add(name)
    return failed | check_exact_codes(kinds) | check_siblings(kinds)


def check_product(
    label: str,
    product: Product,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    exact: torch.Tensor,
) -> bool:
    results = []
    for _ in range(3):
        y = torch.full(exact.shape, float("nan"), dtype=x.dtype, device=DEVICE)
        product(x, bias, y)
        torch.cuda.synchronize()
        results.append(y)
    error = relative_error(results[0], exact)
    same = all(torch.equal(results[0], y) for y in results[1:])
    limit = 5e-3 if x.dtype == torch.bfloat16 else TOLERANCE
    if not (error < limit and same):
        print(f"FAILED {label}: relative error {error:.2e}, repeatable {same}", flush=True)
        return False
    return True


def check_exact_codes(kinds: list[str]) -> set[str]:
    """One-hot inputs read every column alone: scale 1 and zero 0 give back the code itself."""
    failed: set[str] = set()
    for width in WIDTHS if "triton" not in kinds else (2, 3, 4):
        packed = random_packed(256, 256, (width, width))
        tensors = dict(packed.tensors)
        tensors["scales"] = torch.ones_like(tensors["scales"])
        tensors[f"zeros_b{width}"] = torch.zeros_like(tensors[f"zeros_b{width}"])
        weight = build_runtime([PackedWeight(tensors, packed.widths, 256, 256)], DEVICE)
        codes = dequantize_runtime(weight)
        for name, product in products_of(weight, kinds, 16).items():
            rows = []
            for start in range(0, 256, 16):
                x = torch.eye(256, device=DEVICE, dtype=torch.float16)[start : start + 16]
                y = torch.full((16, 256), float("nan"), dtype=torch.float16, device=DEVICE)
                product(x, None, y)
                rows.append(y)
            if not torch.equal(torch.cat(rows).t().float(), codes):
                print(f"FAILED exact codes of width {width}: {name}", flush=True)
                failed.add(name)
    return failed


def check_siblings(kinds: list[str]) -> set[str]:
    weight = case_runtime("q/k/v 12288x4096 mix 3")
    x = torch.randn(3, 4096, device=DEVICE, dtype=torch.float16)
    exact = exact_product(x, weight, None)
    return {
        name
        for name, product in products_of(weight, kinds, 3).items()
        if not check_product(f"siblings {name}", product, x, None, exact)
    }


def check_prefill() -> bool:
    packed = random_packed(1000, 1100, (3, 2, 4, 4, 2, 3, 4, 2, 3), ordered=True)
    linear = MixedLinear([packed], DEVICE)
    weight = build_runtime([packed], DEVICE)
    good = True
    for T in (65, 300):
        x = torch.randn(T, 1100, device=DEVICE, dtype=torch.float16)
        bias = torch.randn(1000, device=DEVICE, dtype=torch.float16)
        error = relative_error(linear(x, bias), exact_product(x, weight, bias))
        if not error < TOLERANCE:
            print(f"FAILED linear T={T}: relative error {error:.2e}", flush=True)
            good = False
    return good


def microseconds(*calls: Callable[[int], object]) -> list[float]:
    """Median time of one call of each, in graphs of `CALLS` of them replayed in turn."""
    graphs = [captured(call) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(REPLAYS):
        for graph, found in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / CALLS * 1e3)
    return [sorted(found)[REPLAYS // 2] for found in times]


def captured(call: Callable[[int], object]) -> torch.cuda.CUDAGraph:
    for i in range(3):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            call(i)
    return graph


def copies(weight: RuntimeWeight) -> list[RuntimeWeight]:
    count = ROTATION_BYTES // weight.nbytes + 2
    return [
        dataclasses.replace(weight, planes=weight.planes.clone(), grid=weight.grid.clone())
        for _ in range(count)
    ]


def in_turn(products: Sequence[Callable[..., object]], *given: object) -> Callable[[int], object]:
    """A call of products of copies of one weight, given the number of the copy."""
    return lambda i: products[i % len(products)](*given)


def half_product(N: int, K: int, T: int) -> Callable[[int], object]:
    weights = [
        torch.randn(N, K, device=DEVICE, dtype=torch.float16)
        for _ in range(ROTATION_BYTES // (2 * N * K) + 2)
    ]
    x = torch.randn(T, K, device=DEVICE, dtype=torch.float16)
    return lambda i: torch.nn.functional.linear(x, weights[i % len(weights)])


@functools.cache
def time_half(N: int, K: int, T: int) -> float:
    return microseconds(half_product(N, K, T))[0]


def time_decoder(decoders: Sequence[Product], N: int, K: int, T: int) -> float:
    x = torch.randn(T, K, device=DEVICE, dtype=torch.float16)
    y = torch.empty(T, N, device=DEVICE, dtype=torch.float16)
    return microseconds(in_turn(decoders, x, None, y))[0]


def decode_rows(
    name: str,
    kinds: list[str],
    failed: set[str],
    token_counts: Sequence[int],
    *,
    every_shape: bool,
) -> list[Row]:
    """A case's products of few tokens: by the shape that a linear would take, or by every one.

    Every one is run with conversion in a launch of its own too, where its blocks would convert.
    """
    cuda = "cuda" in kinds and cuda_library.available(DEVICE)
    rows: list[Row] = []
    weights = copies(case_runtime(name))
    N, K = weights[0].N, weights[0].K
    built: dict[tuple[int, DecodeShape], list[CudaDecoder]] = {}
    for T in token_counts:
        half = time_half(N, K, T)
        bucket = bucket_of(T)
        shapes = SHAPES[bucket] if every_shape else (best_shape(weights[0], bucket),)
        kernels: dict[str, tuple[Sequence[Product], Row]] = {}
        for shape in shapes if cuda else ():
            ways = [shape, dataclasses.replace(shape, fused=0)] if every_shape else [shape]
            for way in ways:
                if shape_name(way) in failed:
                    break
                decoders = built.get((bucket, way))
                if decoders is None:
                    found = [decoder_or_none(weight, way, T) for weight in weights]
                    decoders = [decoder for decoder in found if decoder is not None]
                    built[bucket, way] = decoders
                if not decoders:
                    break
                converts = decoders[0].converts(T)
                launch = dataclasses.astuple(way)[:3]
                kernels[shape_name(way)] = decoders, {"shape": launch, "converts": converts}
                if not converts:
                    break
        if "triton" in kinds and T <= 16:
            kernels["triton"] = [triton_decoder(weight) for weight in weights], {}
        for kernel, (products, settings) in kernels.items():
            if kernel not in failed:
                time = time_decoder(products, N, K, T)
                rows.append(row(name, T, kernel, time, half, weights[0]) | settings)
                print(*list(rows[-1].values())[:8], flush=True)
    return rows


def batch_rows(
    name: str,
    failed: set[str],
    token_counts: Sequence[int],
    *,
    every_shape: bool,
    with_peers: bool,
) -> tuple[list[Row], list[Row]]:
    """A case's products of many tokens beside fp16, replayed in turn, and absent peers.

    Beside a mix stand peers of its average width, or of its widths where a peer has mixes.
    """
    rows: list[Row] = []
    absent: list[Row] = []
    N, K, pattern = ASKED_CASES[name]
    peers: list[matmul_peers.Peer] = []
    faults: dict[str, dict[int, str]] = {}
    if with_peers:
        bits, widths = average(pattern), spread(pattern, K)
        peers, missing = matmul_peers.peers(N, K, bits, widths, ROTATION_BYTES)
        faults = {peer.name: matmul_peers.faults(peer, K, token_counts) for peer in peers}
        absent += absent_rows(name, missing, faults)
    packed = random_packed(N, K, spread(pattern, K))
    weights = copies(build_runtime([packed], DEVICE))
    linears = [] if every_shape else [MixedLinear([packed], DEVICE) for _ in weights]
    for T in token_counts:
        x = torch.randn(T, K, device=DEVICE, dtype=torch.float16)
        y = torch.empty(T, N, device=DEVICE, dtype=torch.float16)
        kernels = batch_products(weights, T) if every_shape else {}
        kernels = {kernel: found for kernel, found in kernels.items() if kernel not in failed}
        calls = [in_turn(found, x, None, y) for found in kernels.values()]
        if linears:
            calls.append(in_turn(linears, x))
        timed = [peer for peer in peers if peer.most_tokens >= T and T not in faults[peer.name]]
        inputs = {peer.dtype: x.to(peer.dtype) for peer in timed}
        calls += [in_turn(peer.calls, inputs[peer.dtype]) for peer in timed]
        labels = [*kernels, *["linear"][: len(linears)], *(peer.name for peer in timed)]
        half, *times = microseconds(half_product(N, K, T), *calls)
        for kernel, time in zip(labels, times, strict=True):
            rows.append(row(name, T, kernel, time, half, weights[0]))
            print(*list(rows[-1].values())[:6], flush=True)
    return rows, absent


def absent_rows(case: str, missing: dict[str, str], faults: dict[str, dict[int, str]]) -> list[Row]:
    """missing: why a peer has no product at all; faults: why not one of so many tokens."""
    whole = [(peer, "all", reason) for peer, reason in missing.items()]
    parts = [(peer, T, reason) for peer, own in faults.items() for T, reason in own.items()]
    keys = ("case", "peer", "tokens", "reason")
    rows = [dict(zip(keys, (case, *row), strict=True)) for row in (*whole, *parts)]
    for found in rows:
        print("ABSENT", *found.values(), flush=True)
    return rows


def average(pattern: tuple[int, ...]) -> int:
    """Bits, a whole number in all of `ASKED_CASES`."""
    return sum(pattern) // len(pattern)


def batch_products(weights: list[RuntimeWeight], T: int) -> dict[str, list[Product]]:
    """By kernel, one product for each copy: every shape that can run so many tokens."""
    found: dict[str, list[Product]] = {}
    for weight in weights:
        for kernel, product in products_of(weight, ["cuda", "batch"], T).items():
            found.setdefault(kernel, []).append(product)
    launches = {kernel: int(kernel.split()[-1][:-1]) for kernel in found if "batch" in kernel}
    # Neither twice too wide nor narrower than need be.
    sizes = sorted({*launches.values()})
    wanted = next((size for size in sizes if size >= T), max(sizes, default=0))
    return {kernel: own for kernel, own in found.items() if launches.get(kernel, wanted) == wanted}


def row(case: str, T: int, kernel: str, time: float, half: float, weight: RuntimeWeight) -> Row:
    target = TARGETS.get(case)
    return {
        "case": case,
        "tokens": T,
        "kernel": kernel,
        "microseconds": round(time, 2),
        "fp16_microseconds": round(half, 2),
        "speedup": round(half / time, 3),
        "terabytes_per_second": round(weight.nbytes / time / 1e6, 3),
        "target": target if T == 1 else None,
        "widths": tiles.widths_present(weight),
        "N": weight.N,
        "K": weight.K,
    }


def prefill_rows(N: int, K: int, pattern: tuple[int, ...]) -> list[Row]:
    packed = random_packed(N, K, spread(pattern, K))
    size = sum(tensor.nbytes for tensor in packed.tensors.values())
    linears = [MixedLinear([packed], DEVICE) for _ in range(ROTATION_BYTES // size + 2)]
    rows: list[Row] = []
    for T in (128, 2048):
        x = torch.randn(T, K, device=DEVICE, dtype=torch.float16)
        half, time = microseconds(half_product(N, K, T), in_turn(linears, x))
        name = "mix 3" if len(pattern) > 1 else f"{pattern[0]}-bit"
        rows.append(
            {
                "case": f"{N}x{K} {name}",
                "tokens": T,
                "microseconds": round(time, 1),
                "fp16_microseconds": round(half, 1),
                "speedup": round(half / time, 3),
                "target": 0.85 if T == 2048 else None,
            }
        )
        print(*rows[-1].values(), flush=True)
    return rows


def provenance() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [f"# {result['provenance']['gpu']}", "", f"`{json.dumps(result['provenance'])}`", ""]
    for part in ("decode", "batch", "absent", "prefill"):
        rows = result.get(part)
        if rows:
            keys = [key for key in rows[0] if key not in UNPRINTED]
            lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
            lines += ["| " + " | ".join(str(r.get(key, "")) for key in keys) + " |" for r in rows]
            lines.append("")
    return "\n".join(lines)


def fastest_shapes(rows: list[Row], gpu: str) -> list[dict[str, Any]]:
    """Entries of tiles.json: of every case and bucket the shape whose tokens take least together.

    A shape counts with conversion by its blocks, where they convert, up to each number of tokens,
    and not at all. Where several cases are one for the table, the fastest of any counts.
    """
    times: dict[tuple[Any, ...], dict[tuple[Any, ...], dict[int, dict[bool, float]]]] = {}
    for r in rows:
        if "shape" in r:
            key = (r["N"], r["K"], r["widths"], bucket_of(r["tokens"]))
            found = times.setdefault(key, {}).setdefault((r["case"], *r["shape"]), {})
            found.setdefault(r["tokens"], {})[r["converts"]] = r["microseconds"]
    entries = []
    for (N, K, widths, bucket), shapes in sorted(times.items()):
        sums = {}
        for (_, *shape), by_tokens in shapes.items():
            for fused in (MAX_FUSED_TOKENS, 0, *by_tokens):
                own = [found.get(fused >= T, found.get(False)) for T, found in by_tokens.items()]
                known = [time for time in own if time is not None]
                if len(known) == len(own):
                    way = (sum(known), -fused, tuple(shape))
                    usual = fused == MAX_FUSED_TOKENS
                    sums[way] = {"shape": shape} | ({} if usual else {"fused": fused})
        case = {"gpu": gpu, "N": N, "K": K, "widths": widths, "tokens": bucket}
        entries.append(case | sums[min(sums)])
    return entries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="time every launch shape")
    parser.add_argument("--write", action="store_true", help="put the best shapes into tiles.json")
    parser.add_argument("--kernels", nargs="*", default=["cuda", "triton", "prefill"])
    parser.add_argument("--cases", nargs="*", choices=list(SWEPT), help="the table's, or all")
    parser.add_argument("--batch", nargs="*", default=list(BATCH_CASES), choices=list(ASKED_CASES))
    parser.add_argument("--tokens", nargs="*", type=int, help="of batches, and of --sweep")
    parser.add_argument("--peers", action="store_true", help="time other projects' kernels too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.write and not options.sweep:
        parser.error("--write needs --sweep, whose best shapes it writes")
    failed = check(options.kernels)
    if "prefill" in options.kernels and not check_prefill():
        failed.add("prefill")
    print(f"check done, failed: {sorted(failed) or 'none'}", flush=True)
    result: dict[str, Any] = {"provenance": provenance(), "failed": sorted(failed)}
    if options.peers:
        result["provenance"]["peers"] = matmul_peers.versions()
    usual = SWEPT if options.sweep else CASES
    cases = list(usual) if options.cases is None else options.cases
    if not {"cuda", "triton"} & set(options.kernels):
        cases = []
    kinds = "" if len(options.kernels) == 3 else f"{options.kernels[0]}-"
    name = f"matmul-{'sweep-' if options.sweep else kinds}{result['provenance']['gpu']}"
    file = options.out / name.replace(" ", "-").lower()
    swept = [T for T in options.tokens or TOKENS_SWEPT if TOKEN_BUCKETS[-1] >= T]
    few = swept if options.sweep else TOKENS_TIMED
    result["decode"] = []
    for case in cases:
        rows = decode_rows(case, options.kernels, failed, few, every_shape=options.sweep)
        result["decode"] += rows
        write(result, file)
    if options.sweep:
        gpu = result["provenance"]["gpu"]
        result["settings"] = {"decode_cuda": fastest_shapes(result["decode"], gpu)}
    if "batch" in options.kernels:
        tokens = options.tokens or BATCHES
        if options.peers:
            matrices = [ASKED_CASES[case] for case in options.batch]
            matmul_peers.prepare([(N, K, average(own)) for N, K, own in matrices], tokens)
        result["batch"], result["absent"] = [], []
        for case in options.batch:
            rows, absent = batch_rows(
                case, failed, tokens, every_shape=options.sweep, with_peers=options.peers
            )
            result["batch"] += rows
            result["absent"] += absent
            write(result, file)
    if "prefill" in options.kernels and "prefill" not in failed:
        result["prefill"] = []
        for (N, K), pattern in itertools.product(PREFILL, PREFILL_PATTERNS):
            result["prefill"] += prefill_rows(N, K, pattern)
            write(result, file)
    if options.write:
        matmul_tiles.merge(result["settings"])
    print(write(result, file))
    return 1 if failed else 0


def write(result: dict[str, Any], file: Path) -> str:
    """Put what there is into the file's JSON and markdown; the latter."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    file.with_suffix(".md").write_text(text + "\n")
    return text


if __name__ == "__main__":
    raise SystemExit(main())
