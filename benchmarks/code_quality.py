"""Whole jobs by code and budget on a GGUF model: perplexity, KL and seconds.

    python benchmarks/code_quality.py MODEL.gguf --bits 2.54 3.04 4.04 --codes trellis affine \\
        --device cuda --work WORK --out benchmarks/results/code-quality-gemma

Jobs are as by default (64 calibration windows of 2048 tokens, both evaluation texts whole, GPTQ,
knapsack) with a budget of true bits. A profile is kept in --work for all budgets. Excess is
ln(perplexity / perplexity of the source), mean of both texts. Rows go to OUT.json as they finish,
and to OUT.md; --smoke takes few and short windows instead, to try the script.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from bitmill.config.quantization import parse_config
from bitmill.pipeline.job import run_job

SMOKE = {
    "calibration": {"sequences": 4, "held_out": 2, "length": 256},
    "evaluation": {"sequences": 2, "length": 256},
}


def row_of(options: argparse.Namespace, code: str, bits: float, allocation: str) -> dict[str, Any]:
    """One job, and what its report says."""
    spec: dict[str, Any] = {
        "code": code,
        "budget": {"bits": bits},
        "allocation": {"method": allocation},
    }
    folder = options.work / f"{code}-{bits}-{allocation}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seconds: dict[str, float] = {}
    start = {"time": time.perf_counter()}

    def stage(event: Any) -> None:
        if event.kind == "stage" and event.state == "finished":
            now = time.perf_counter()
            seconds[event.stage], start["time"] = now - start["time"], now

    found = run_job(
        parse_config(spec | (SMOKE if options.smoke else {})),
        options.model.parent,
        folder / "work",
        folder / "out",
        gguf=options.model.name,
        profile_folder=options.work / "profiles",
        device=options.device,
        on_progress=stage,
    )
    source, packed = found.quality.rows[:2]
    texts = {name: (source.texts[name], packed.texts[name]) for name in packed.texts}
    excess = [math.log(ours.perplexity / theirs.perplexity) for theirs, ours in texts.values()]
    shutil.rmtree(folder)
    return {
        "code": code,
        "allocation": allocation,
        "asked": bits,
        "bits": packed.bits,
        "code_bits": packed.code_bits,
        "perplexity": {name: ours.perplexity for name, (_, ours) in texts.items()},
        "source": {name: theirs.perplexity for name, (theirs, _) in texts.items()},
        "kl": {name: ours.kl for name, (_, ours) in texts.items()},
        "excess": sum(excess) / len(excess),
        "predicted": found.quality.predicted_loss,
        "seconds": seconds,
    }


def markdown(options: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """All rows as a table."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    texts = list(rows[0]["perplexity"])
    lines = [
        f"# Codes on {options.model.stem}",
        f"`benchmarks/code_quality.py`, {device}, torch {torch.__version__}. Source: "
        + ", ".join(f"{rows[0]['source'][name]:.3f} ({name})" for name in texts)
        + ".",
        "",
        "| code | allocation | bits | code bits | "
        + " | ".join(f"{name}, KL" for name in texts)
        + " | excess | refine s | all s |",
        "|---|---|---|---|" + "---|" * (len(texts) + 3),
    ]
    for row in rows:
        cells = [f"{row['perplexity'][name]:.3f}, {row['kl'][name]:.4f}" for name in texts]
        lines.append(
            f"| {row['code']} | {row['allocation']} | {row['bits']:.3f} | {row['code_bits']:.3f} | "
            + " | ".join(cells)
            + f" | {row['excess']:.4f} | {row['seconds'].get('refine', 0):.0f} "
            f"| {sum(row['seconds'].values()):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all jobs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=float, nargs="+", required=True)
    parser.add_argument("--codes", nargs="+", default=["trellis", "affine"])
    parser.add_argument("--allocation", default="knapsack")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for code in options.codes:
        for bits in options.bits:
            rows.append(row_of(options, code, bits, options.allocation))
            options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
            options.out.with_suffix(".md").write_text(markdown(options, rows))
            print(markdown(options, rows).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
