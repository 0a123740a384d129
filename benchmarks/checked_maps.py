"""Maps measured on held-out windows before they are refined, and costs corrected by measurements.

    python benchmarks/checked_maps.py SOURCE --device cuda --out FOLDER --bits 3.16 4.17

For every budget of true bits: the uniform map and the knapsack's, quantized by plain GPTQ on the
float model's inputs of the first windows, and their KL on held-out windows of the calibration text
against the predicted loss; then every linear, block and kind of linear alone, factors from these
measurements, the maps that corrected costs give and their KL. --refine also refines the maps as a
job does, all windows, prefix correction included, and measures both evaluation texts.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quality import BATCH, Bench, Windows, measured, refined, spec_of
from quality_variants import CHOSEN_RIDGE, COST, Variant
from torch import Tensor, nn

from bitmill.allocation.allocator import allocate
from bitmill.allocation.profile import SensitivityProfile
from bitmill.calibration.hooks import run_windows
from bitmill.calibration.statistics import Stream
from bitmill.config.bit_width_map import WIDTHS, BitWidthMap
from bitmill.errors import BudgetError
from bitmill.evaluation.logits import perplexity_and_kl
from bitmill.formats.accounting import footprint
from bitmill.models.streamed import set_weight
from bitmill.refinement.block import RefineSettings, refine_block
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.gptq.solve import GptqSolver
from bitmill.transforms.column_order import ColumnOrders

QUICK = RefineSettings(GptqSolver(GptqSettings(compensated=None, rounds=0)), batch=BATCH)


class Checks:
    """One model: quick solutions of maps and their KL on held-out windows."""

    def __init__(self, bench: Bench, windows: int, judged: int, alone: int) -> None:
        self.bench, self.windows = bench, windows
        self.judged = bench.tokens.held_out[:judged]
        self.few = bench.tokens.held_out[:alone]
        self.reference = bench.run(bench.blocks, self.judged)
        self.states = [bench.embed(self.few)] if alone else []
        for i, block in enumerate(bench.blocks if alone else ()):
            self.states.append(run_windows(bench.model, i, block, self.states[-1], batch=BATCH))
        variant = Variant("weighted", "knapsack", 3.0, "activation", CHOSEN_RIDGE, COST)
        self.variant = replace(variant, profile=replace(COST, widths=WIDTHS))
        started = time.perf_counter()
        self.profile = bench.profile(self.variant)
        print(f"profile {time.perf_counter() - started:.0f} s", flush=True)

    def map(
        self, bits: float, profile: SensitivityProfile, method: str = "knapsack"
    ) -> BitWidthMap:
        allocation = {"method": method, "widths": [2, 3, 4, 5, 6, 8]}
        asked = spec_of({"budget": {"bits": bits}, "allocation": allocation})
        return allocate(self.bench.plan, asked, profile)

    def solve(self, chosen: BitWidthMap) -> list[dict[str, Tensor]]:
        """Dequantized weights of every block, on the float model's inputs."""
        bench = self.bench
        orders = {
            linear.name: torch.from_numpy(self.profile.orders[linear.order]).long()
            for linear in self.profile.linears
            if linear.order is not None
        }
        settings = replace(QUICK, transforms=(ColumnOrders(orders),))
        stream, result = bench.embed(bench.tokens.tokens[: self.windows]), []
        for i, original in enumerate(bench.blocks):
            block = copy.deepcopy(original)
            widths = {li.name: chosen.linears[li.name] for li in bench.plan.block_linears(i)}
            found, _ = refine_block(bench.model, i, block, Stream(stream), widths, settings)
            result.append({name: weight.dequantize() for name, weight in found.items()})
            stream = run_windows(bench.model, i, original, stream, batch=BATCH)
        return result

    def block(self, i: int, weights: Mapping[str, Tensor]) -> nn.Module:
        block = copy.deepcopy(self.bench.blocks[i])
        linears = self.bench.model.linears(block, i)
        for name, weight in weights.items():
            set_weight(linears[name], weight)
        return block

    def kl(self, solved: list[dict[str, Tensor]]) -> float:
        blocks = [self.block(i, weights) for i, weights in enumerate(solved)]
        return self._kl(self.reference, self.bench.run(blocks, self.judged), self.judged)

    def _kl(self, source: Tensor, hidden: Tensor, tokens: Tensor) -> float:
        model = self.bench.model
        found = perplexity_and_kl(Windows(model, source), Windows(model, hidden), tokens)
        return float(found.kl.mean())

    def alone(self, solved: list[dict[str, Tensor]], names: Collection[str]) -> float:
        """KL with these linears alone quantized, on the few windows."""
        parts = [{n: w for n, w in weights.items() if n in names} for weights in solved]
        first = next(i for i, part in enumerate(parts) if part)
        hidden = self.states[first]
        for i in range(first, len(parts)):
            block = self.block(i, parts[i]) if parts[i] else self.bench.blocks[i]
            hidden = run_windows(self.bench.model, i, block, hidden, batch=BATCH)
        return self._kl(self.states[-1], hidden, self.few)


def corrected(profile: SensitivityProfile, factors: Mapping[str, float]) -> SensitivityProfile:
    """The profile with the costs of every linear times its factor."""
    linears = tuple(replace(li, costs=li.costs * factors[li.name]) for li in profile.linears)
    return replace(profile, linears=linears)


def study(checks: Checks, bits: float, refine: list[str]) -> dict[str, Any]:
    """Everything about one budget."""
    plan, profile = checks.bench.plan, checks.profile
    names = list(plan.by_name)
    maps = {"knapsack": checks.map(bits, profile)}
    try:
        maps["uniform"] = checks.map(bits, profile, "uniform")
    except BudgetError:
        print("no uniform map fits")
    result: dict[str, Any] = {"maps": {}}
    factors: dict[str, dict[str, float]] = {}

    def measure(tag: str) -> list[dict[str, Tensor]]:
        started = time.perf_counter()
        solved = checks.solve(maps[tag])
        solving = time.perf_counter() - started
        result["maps"][tag] = {
            "bits": footprint(plan, maps[tag]).bits,
            "predicted": profile.predicted_loss(maps[tag].linears),
            "quick_kl": checks.kl(solved),
            "solve_s": solving,
            "all_s": time.perf_counter() - started,
        }
        print(bits, tag, result["maps"][tag], flush=True)
        return solved

    for tag in list(maps):
        solved = measure(tag)
        if tag != "knapsack" or not len(checks.few):
            continue
        predicted = {n: profile.predicted_loss({n: maps[tag].linears[n]}) for n in names}
        started = time.perf_counter()
        alone = {n: checks.alone(solved, {n}) for n in names}
        print(f"linears alone {time.perf_counter() - started:.0f} s", flush=True)
        factors["linear"] = {n: alone[n] / predicted[n] for n in names}
        result["linears"] = {n: [predicted[n], alone[n]] for n in names}
        blocks = {n: str(plan.by_name[n].block) for n in names}
        for what, part in (("block", blocks), ("kind", {n: kind(n) for n in names})):
            parts = {p: {n for n in names if part[n] == p} for p in sorted(set(part.values()))}
            found = {p: checks.alone(solved, own) for p, own in parts.items()}
            share = {p: sum(predicted[n] for n in own) for p, own in parts.items()}
            factors[what] = {n: found[part[n]] / share[part[n]] for n in names}
            result[what + "s"] = {p: [share[p], found[p]] for p in parts}
        factors["both"] = {n: factors["block"][n] * factors["kind"][n] for n in names}
        factors["root"] = {n: factors["linear"][n] ** 0.5 for n in names}
    for what, own in factors.items():
        limited = {n: min(8.0, max(1 / 8, f)) for n, f in own.items()}
        maps[what] = checks.map(bits, corrected(profile, limited))
        measure(what)
    for tag in refine:
        tag, _, damping = tag.partition("@")
        if tag in maps:
            started = time.perf_counter()
            variant = checks.variant
            if damping:
                solver = variant.refine.solver
                assert isinstance(solver, GptqSolver)
                other = replace(solver.settings, damping=(float(damping), 0.1, 0.5))
                solver = replace(solver, settings=other)
                variant = replace(variant, refine=replace(variant.refine, solver=solver))
            modules, _ = refined(checks.bench, variant, maps[tag])
            texts = measured(checks.bench, modules)
            held = checks._kl(
                checks.reference, checks.bench.run(modules, checks.judged), checks.judged
            )
            entry = {"texts": texts, "held_kl": held, "damping": damping}
            result["maps"][tag].setdefault("refined", []).append(entry)
            print(
                bits, tag, damping, f"{time.perf_counter() - started:.0f} s held {held}", flush=True
            )
            print({t: (v["perplexity"], v["kl"]) for t, v in texts.items()}, flush=True)
    return result


def kind(name: str) -> str:
    return name.rpartition(".")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[3.16])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--judged", type=int, default=8)
    parser.add_argument("--alone", type=int, default=2)
    parser.add_argument("--refine", nargs="*", default=[])
    parser.add_argument("--text", default="wiki_calibration")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--tf32", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.source, options)
    checks = Checks(bench, options.windows, options.judged, options.alone)
    source = measured(bench, bench.blocks) if options.refine else {}
    results: dict[str, Any] = {"source": source, "bits": {}}
    for bits in options.bits:
        results["bits"][str(bits)] = study(checks, bits, options.refine)
        (options.out / "checked-maps.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
