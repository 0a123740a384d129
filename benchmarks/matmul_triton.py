"""Launch shapes of Triton's kernels on the GPU at hand, measured for `tiles.json`.

    python benchmarks/matmul_triton.py --write

For every case and token tile of the decode kernel: tiles of several sizes, warps and numbers of
slices; then other stages of the two fastest and other slices of the fastest; then the three
fastest and the rule of `tiles.py` once more, in turn. Of the kernel that dequantizes: rows and
warps. Shapes that do not compile, need more than the GPU has, or give other values than fp64 says
are left out by name. Times as in `matmul.py`, the activation prologue included; the table sets the
rule beside the shape found. Where the rule is the fastest, the case has no entry.

Kernels are compiled ahead, on all processors. `--seconds` begins no case after so
many. The record in benchmarks/results/ (or --out) is written after every case;
`matmul_tiles.py RECORD.json` puts its settings into `tiles.json` on another machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matmul
import matmul_tiles
import torch
from triton.errors import TritonError

from bitmill_kernels.backend import interpreted
from bitmill_kernels.matmul import tiles
from bitmill_kernels.matmul.decode_triton import TOKEN_TILES, Tile, TritonDecoder
from bitmill_kernels.matmul.dequantize_triton import RULE, Dequantizer, DequantizeTile
from bitmill_kernels.matmul.linear import DEQUANTIZE_ABOVE, rows_of_a_run
from bitmill_kernels.matmul.runtime import RuntimeWeight, dequantize_runtime
from bitmill_kernels.matmul.units import divides_rows

TOKENS = (1, 8, 16, 32, 64, 128, 512)
ROWS_AND_WARPS = ((32, 2), (32, 4), (64, 4), (64, 8), (128, 4), (128, 8))
PROGRAMS = (2, 3, 6)
"""Most programs a processor, of which the slices follow."""
MORE_PROGRAMS = (1, 4, 8)
STAGES = 3
OTHER_STAGES = (2, 4)
DEQUANTIZE_TILES = tuple(
    DequantizeTile(rows, warps) for rows in (16, 32, 64, 128) for warps in (2, 4, 8)
)
FINALISTS = 3
ALONE = [name for name, (rows, *_) in matmul.SWEPT.items() if len(rows) == 1]
"""Stacked linears are one case with a single one of as many rows and widths."""

Launch = tuple[int, Tile]
"""Tokens that a program takes, and its tile."""
Timer = Callable[..., list[float]]
"""Microseconds of calls, which take the number of a copy of the weight; those of one timing in
turn: `matmul.microseconds`."""


class Decode:
    """The decode kernel by one launch shape, on copies of a weight."""

    def __init__(self, weights: Sequence[RuntimeWeight], x: torch.Tensor, launch: Launch) -> None:
        tokens, tile = launch
        self.x, self.launch = x, launch
        self.y = x.new_full((len(x), weights[0].N), float("nan"))
        self._decoders = [
            TritonDecoder(weight, {tokens: tile}, asm=not interpreted()) for weight in weights
        ]

    def __call__(self, i: int) -> torch.Tensor:
        self._decoders[i % len(self._decoders)](self.x, None, self.y)
        return self.y

    def is_right(self, exact: torch.Tensor) -> bool:
        """Whether the product made last is exact enough, and made so again."""
        found = self.y.clone()
        again = torch.equal(found, self(0))
        return again and matmul.relative_error(found, exact) < matmul.TOLERANCE


class Dequantize:
    """All weights in half precision by one launch shape, and their product with x if there is."""

    def __init__(
        self,
        weights: Sequence[RuntimeWeight],
        tile: DequantizeTile,
        x: torch.Tensor | None = None,
    ) -> None:
        N, K, device = weights[0].N, weights[0].K, weights[0].planes.device
        rows = rows_of_a_run(N, K)
        self.x, self.launch = x, tile
        self.y = None if x is None else x.new_empty(len(x), N)
        self._dequantizers = [Dequantizer(weight, rows, tile) for weight in weights]
        most = max(run.rows for run in self._dequantizers[0].runs)
        self._scratch = torch.full((most, K), float("nan"), dtype=torch.float16, device=device)

    def __call__(self, i: int) -> None:
        for _ in self.runs(i):
            pass

    def runs(self, i: int) -> Any:
        dequantizer = self._dequantizers[i % len(self._dequantizers)]
        for run in dequantizer.runs:
            rows = self._scratch[: run.rows]
            dequantizer(run, rows)
            if self.x is not None and self.y is not None:
                torch.mm(self.x, rows.t(), out=self.y[:, run.first : run.first + run.rows])
            yield run, rows

    def is_right(self, exact: torch.Tensor) -> bool:
        return all(
            torch.equal(rows, exact[run.first : run.first + run.rows]) for run, rows in self.runs(0)
        )


def runnable(candidates: Sequence[Any], exact: torch.Tensor) -> list[Any]:
    """Those that compile, fit the GPU and are right."""
    found = []
    for candidate in candidates:
        wrong = fault(candidate)
        if wrong is None and not candidate.is_right(exact):
            wrong = "another value than fp64 says, or than the launch before"
        if wrong is None:
            found.append(candidate)
        else:
            print(f"left out {candidate.launch}: {wrong}", flush=True)
    return found


def fault(candidate: Any) -> str | None:
    """Why a launch shape cannot run, if so."""
    try:
        candidate(0)
    except (TritonError, RuntimeError) as error:
        return str(error).partition("\n")[0]
    return None


def timed(candidates: Sequence[Any], exact: torch.Tensor, timer: Timer) -> dict[Any, float]:
    """Microseconds by launch, of those that can run."""
    usable = runnable(candidates, exact)
    return {one.launch: t for one, t in zip(usable, timer(*usable), strict=True)} if usable else {}


def fastest(found: Mapping[Any, float]) -> list[Any]:
    """The launches, fastest first."""
    return sorted(found, key=lambda launch: found[launch])


def first_tiles(weight: RuntimeWeight, processors: int) -> list[Tile]:
    return distinct(
        Tile(rows, tiles.slices(weight, rows, programs * processors), warps, STAGES)
        for rows, warps in ROWS_AND_WARPS
        if divides_rows(weight, rows)
        for programs in PROGRAMS
    )


def next_tiles(weight: RuntimeWeight, processors: int, best: Sequence[Tile]) -> list[Tile]:
    """Other stages of tiles unlike in rows or warps, and other slices of the best."""
    unlike = {(tile.rows, tile.warps): tile for tile in reversed(best)}
    leading = sorted(unlike.values(), key=best.index)[:2]
    return distinct(
        [dataclasses.replace(tile, stages=stages) for tile in leading for stages in OTHER_STAGES]
        + [
            dataclasses.replace(
                best[0], split=tiles.slices(weight, best[0].rows, programs * processors)
            )
            for programs in MORE_PROGRAMS
        ]
    )


def compile_ahead(candidates: Sequence[Any]) -> None:
    """Compile what is to be timed, several at a time; faults come again where it is timed."""
    fault(candidates[0])
    workers = 1 if interpreted() else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(fault, candidates[1:]))


def inputs(weight: RuntimeWeight, T: int) -> torch.Tensor:
    return torch.randn(T, weight.K, device=weight.planes.device).half()


def tile_of(T: int) -> int:
    return next(tile for tile in TOKEN_TILES if tile >= T)


def distinct(found: Any) -> list[Any]:
    return list(dict.fromkeys(found))


def tune_decode(
    weights: Sequence[RuntimeWeight], T: int, processors: int, timer: Timer = matmul.microseconds
) -> tuple[Launch, Launch, dict[Launch, float]]:
    """(launch of the rule, the fastest, microseconds of all) of T tokens, in the smallest tile."""
    weight = weights[0]
    x = inputs(weight, T)
    exact = matmul.exact_product(x, weight, None)
    tokens = tile_of(T)
    by_rule = tiles.triton_rule(weight, processors)
    rule = next((own, tile) for own, tile in by_rule.items() if own >= T)

    def measured(launches: Sequence[Launch]) -> dict[Launch, float]:
        return timed([Decode(weights, x, launch) for launch in launches], exact, timer)

    found = measured(distinct([rule, *((tokens, t) for t in first_tiles(weight, processors))]))
    best = [tile for own, tile in fastest(found) if own == tokens]
    if best:
        after = next_tiles(weight, processors, best)
        found |= measured([(tokens, tile) for tile in after if (tokens, tile) not in found])
    final = measured(distinct([rule, *fastest(found)[:FINALISTS]]))
    if not final:
        raise RuntimeError(f"no launch shape runs {T} tokens of N={weight.N}, K={weight.K}")
    return rule, fastest(final)[0], found | final


def tune_dequantize(
    weights: Sequence[RuntimeWeight], timer: Timer = matmul.microseconds
) -> tuple[DequantizeTile, dict[DequantizeTile, float]]:
    """(the fastest, microseconds of all)."""
    exact = dequantize_runtime(weights[0]).half()

    def measured(launches: Sequence[DequantizeTile]) -> dict[DequantizeTile, float]:
        return timed([Dequantize(weights, tile) for tile in launches], exact, timer)

    found = measured(DEQUANTIZE_TILES)
    final = measured(distinct([RULE, *fastest(found)[:FINALISTS]]))
    if not final:
        raise RuntimeError(f"no launch shape dequantizes N={weights[0].N}, K={weights[0].K}")
    return fastest(final)[0], found | final


def tune_case(
    name: str,
    weights: Sequence[RuntimeWeight],
    token_counts: Sequence[int],
    gpu: str,
    processors: int,
    timer: Timer = matmul.microseconds,
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """(rows of the table, settings, everything timed) of one case."""
    weight = weights[0]
    widths = tiles.widths_present(weight)
    case = {"gpu": gpu, "N": weight.N, "K": weight.K, "widths": widths}
    by_tile: dict[int, list[int]] = {}
    for T in sorted(T for T in token_counts if T <= DEQUANTIZE_ABOVE):
        by_tile.setdefault(tile_of(T), []).append(T)
    compile_ahead(
        [
            Decode([weight], inputs(weight, asked[0]), (tokens, tile))
            for tokens, asked in by_tile.items()
            for tile in every_kernel(weight)
        ]
        + [Dequantize([weight], tile) for tile in DEQUANTIZE_TILES]
    )
    launches: dict[int, tuple[Any, Any]] = {}
    settings: dict[str, list[dict[str, Any]]] = {"decode_triton": [], "dequantize_triton": []}
    swept: list[dict[str, Any]] = []
    for tokens, asked in by_tile.items():
        rule, best, found = tune_decode(weights, asked[0], processors, timer)
        launches |= dict.fromkeys(asked, (rule if rule in found else None, best))
        shape = None if best == rule else dataclasses.astuple(best[1])
        settings["decode_triton"].append(case | {"tokens": tokens, "shape": shape})
        swept += timings(name, asked[0], found)
    many = [T for T in token_counts if T > DEQUANTIZE_ABOVE]
    if many:
        tile, times = tune_dequantize(weights, timer)
        launches |= dict.fromkeys(many, (RULE if RULE in times else None, tile))
        shape = None if tile == RULE else dataclasses.astuple(tile)
        settings["dequantize_triton"].append(case | {"shape": shape})
        swept += timings(name, None, times)
    rows = [table_row(name, weights, T, *launches[T], timer) for T in token_counts]
    return rows, settings, swept


def every_kernel(weight: RuntimeWeight) -> list[Tile]:
    """A tile for each kernel that may be timed; slices need none of their own."""
    return [
        Tile(rows, 1, warps, stages)
        for rows, warps in ROWS_AND_WARPS
        if divides_rows(weight, rows)
        for stages in (STAGES, *OTHER_STAGES)
    ]


def timings(name: str, T: int | None, found: Mapping[Any, float]) -> list[dict[str, Any]]:
    return [
        {"case": name, "tokens": T, "launch": shape_name(launch)}
        | {"microseconds": round(found[launch], 2)}
        for launch in fastest(found)
    ]


def table_row(
    name: str,
    weights: Sequence[RuntimeWeight],
    T: int,
    rule: Any,
    tuned: Any,
    timer: Timer = matmul.microseconds,
) -> dict[str, Any]:
    """fp16, the rule (None where it does not run) and the shape found, replayed in turn."""
    N, K = weights[0].N, weights[0].K
    x = inputs(weights[0], T)
    ways = [
        Dequantize(weights, launch, x)
        if isinstance(launch, DequantizeTile)
        else Decode(weights, x, launch)
        for launch in (tuned, rule)
        if launch is not None
    ]
    half, best, *others = timer(matmul.half_product(N, K, T), *ways)
    row = {
        "case": name,
        "tokens": T,
        "fp16_microseconds": round(half, 2),
        "rule": shape_name(rule) if rule else "does not run",
        "rule_microseconds": round(others[0], 2) if others else None,
        "tuned": shape_name(tuned),
        "tuned_microseconds": round(best, 2),
        "rule_over_tuned": round(others[0] / best, 3) if others else None,
        "fp16_over_tuned": round(half / best, 3),
    }
    print(*row.values(), flush=True)
    return row


def shape_name(launch: Any) -> str:
    if isinstance(launch, DequantizeTile):
        return f"dequantize {launch.rows}r {launch.warps}w"
    tokens, tile = launch
    return f"{tokens}t {tile.rows}r {tile.split}s {tile.warps}w {tile.stages}st"


def markdown(result: dict[str, Any]) -> str:
    lines = [f"# {result['provenance']['gpu']}", "", f"`{json.dumps(result['provenance'])}`", ""]
    rows = result["rows"]
    if rows:
        lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=ALONE, choices=matmul.SWEPT)
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after")
    parser.add_argument("--write", action="store_true", help="put the fastest into tiles.json")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(1)
    provenance = matmul.provenance()
    gpu, processors = provenance["gpu"], provenance["multiprocessors"]
    settings: dict[str, list[dict[str, Any]]] = {}
    result: dict[str, Any] = {
        "provenance": provenance,
        "rows": [],
        "settings": settings,
        "swept": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"matmul-triton-sweep-{gpu}".replace(" ", "-").lower()
    for name in options.cases:
        if time.monotonic() - start > options.seconds:
            print(f"{options.seconds} s are over: {name} and later cases are left out", flush=True)
            break
        weights = matmul.copies(matmul.case_runtime(name))
        rows, found, swept = tune_case(name, weights, options.tokens, gpu, processors)
        result["rows"] += rows
        result["swept"] += swept
        for kernel, entries in found.items():
            settings.setdefault(kernel, []).extend(entries)
        file.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        file.with_suffix(".md").write_text(markdown(result))
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    if options.write:
        matmul_tiles.merge(settings)


if __name__ == "__main__":
    main()
