"""What the cost model of the profile is worth: one budget, one refinement, different costs.

    python benchmarks/allocation_points.py SOURCE --device cuda --out OUT.json --jobs NAME:BITS ...

Protocol, source and device as in `results.py`; refinement is plain GPTQ with clip search, so that
rows differ in their maps alone. `NAME` is one of COSTS below, or:

    slopes1, slopes2   costs corrected by the loss slopes at the map before, once or twice
    halfslopes         the same with the square root of the correction
    reference          a second profile whose gradients are taken at the quantized model

Each row carries predicted and measured loss; slopes rows also each linear's cost and slope.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quality import Bench, measured, refined, spec_of, widths_histogram
from quality_variants import CLIP, FULL, WIDTHS, Variant
from torch import nn

from bitmill.allocation.allocator import allocate
from bitmill.allocation.profile import SensitivityProfile
from bitmill.calibration.gradients import PassSettings
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.quant.grid import ClipSettings
from bitmill.sensitivity.fisher import SensitivitySettings, profile_knapsack
from bitmill.sensitivity.loss_slopes import KL_PASS, corrected, loss_slopes

BASE = SensitivitySettings(widths=WIDTHS, gradients=PassSettings(batch=8))
SAMPLED = PassSettings(batch=8, labels="sampled")
COSTS: dict[str, SensitivitySettings] = {
    "base": BASE,
    "rounding": replace(BASE, cost="rounding"),
    "fullclip": replace(BASE, clip=ClipSettings()),
    "from2": replace(BASE, compensate_from=2),
    "from3": replace(BASE, compensate_from=3),
    "weighted": replace(BASE, moments="weighted"),
    "sampled": replace(BASE, gradients=SAMPLED),
    "weightedsampled": replace(BASE, moments="weighted", gradients=SAMPLED),
}
ITERATED = ("slopes1", "slopes2", "halfslopes", "reference")


class Points:
    """Profiles and maps of one bench, each made once."""

    def __init__(self, bench: Bench, full: bool) -> None:
        self.bench = bench
        self.refine = FULL if full else CLIP
        self._profiles: dict[str, SensitivityProfile] = {}
        self._blocks: dict[str, list[nn.Module]] = {}

    def base(self, name: str) -> SensitivityProfile:
        if name not in self._profiles:
            self._profiles[name] = profile_knapsack(
                self.bench.model, self.bench.tokens.tokens, self.bench.plan, COSTS[name]
            )
        return self._profiles[name]

    def map(self, profile: SensitivityProfile, bits: float) -> BitWidthMap:
        spec = spec_of({"budget": {"code_bits": bits}, "allocation": {"widths": list(WIDTHS)}})
        return allocate(self.bench.plan, spec, profile)

    def blocks(self, chosen: BitWidthMap) -> list[nn.Module]:
        key = chosen.to_json()
        if key not in self._blocks:
            variant = Variant("point", "knapsack", 0, "activation", self.refine)
            self._blocks = {key: refined(self.bench, variant, chosen)[0]}
        return self._blocks[key]

    def quantizer(self, chosen: BitWidthMap) -> Callable[[int, nn.Module], None]:
        blocks = self.blocks(chosen)

        @torch.no_grad()
        def quantize(i: int, block: nn.Module) -> None:
            block.load_state_dict(blocks[i].state_dict())

        return quantize

    def slopes(self, chosen: BitWidthMap) -> dict[str, float]:
        tokens = self.bench.tokens.tokens
        settings = replace(KL_PASS, batch=8)
        return loss_slopes(self.bench.model, tokens, self.quantizer(chosen), settings)

    def row(self, name: str, bits: float) -> dict[str, Any]:
        entry: dict[str, Any] = {}
        profile = self.base(name if name in COSTS else "base")
        if name == "reference":
            start = self.map(profile, bits)
            profile = profile_knapsack(
                self.bench.model,
                self.bench.tokens.tokens,
                self.bench.plan,
                COSTS["base"],
                prepare=self.quantizer(start),
            )
        elif name in ITERATED:
            base, strength = profile, 0.5 if name == "halfslopes" else 1.0
            for _ in range(2 if name == "slopes2" else 1):
                chosen = self.map(profile, bits)
                slopes = self.slopes(chosen)
                entry["linears"] = {
                    linear: [base.predicted_loss({linear: widths}), slopes[linear]]
                    for linear, widths in chosen.linears.items()
                }
                profile = corrected(base, chosen.linears, slopes, strength=strength)
        chosen = self.map(profile, bits)
        entry |= {
            "name": name,
            "bits": bits,
            "predicted": profile.predicted_loss(chosen.linears),
            "widths": widths_histogram(chosen),
            "texts": measured(self.bench, self.blocks(chosen)),
        }
        return entry


def uniform_row(points: Points, bits: int) -> dict[str, Any]:
    """Predicted against measured loss of one width everywhere."""
    chosen = BitWidthMap(
        order="activation",
        linears={s.name: (bits,) * s.groups for s in points.bench.plan.shapes},
    )
    predicted = {
        name: profile.predicted_loss(chosen.linears) for name, profile in points._profiles.items()
    }
    texts = measured(points.bench, points.blocks(chosen))
    return {"name": "uniform", "bits": bits, "predicted": predicted, "texts": texts}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--full", action="store_true", help="refine as the product does")
    parser.add_argument("--jobs", nargs="+", help="NAME:BITS")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.source, options.work, torch.device(options.device), options.smoke)
    points = Points(bench, options.full)
    rows: list[dict[str, Any]] = []
    for job in options.jobs or []:
        name, _, bits = job.partition(":")
        started = time.perf_counter()
        if name == "uniform":
            entry = uniform_row(points, int(bits))
        else:
            entry = points.row(name, float(bits))
        entry["seconds"] = round(time.perf_counter() - started, 1)
        rows.append(entry)
        options.out.write_text(json.dumps(rows, indent=1))
        wiki = entry["texts"]["wiki_evaluation"]
        book = entry["texts"]["handbook_evaluation"]
        print(
            f"{name} {bits} ppl {wiki['perplexity']:.2f} kl {wiki['kl']:.4f} "
            f"handbook {book['perplexity']:.2f} {book['kl']:.4f} predicted {entry['predicted']} "
            f"{entry.get('widths', '')} {entry['seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
