"""Columns kept in 16 bits against none, at the same true bits: what outliers are worth.

    python benchmarks/outliers.py SOURCE --work WORK --out benchmarks/results/outliers

One profile with the costs of outliers serves all. For every budget a job whose linears may keep
columns measures the knapsack's maps with and without on held-out windows and refines the one of
least KL; the other of the two is refined by the same settings beside it. Both evaluation texts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import bitmill
from bitmill.config.bit_width_map import BitWidthMap, outlier_bytes
from bitmill.plan.model_plan import Plan

TEXTS = ("wiki_evaluation", "handbook_evaluation")


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What all calls are given."""
    (sequences, length), (count, of) = options.calibration, options.evaluation
    return {
        "calibration_sequences": sequences,
        "calibration_length": length,
        "held_out": options.held_out,
        "evaluation_sequences": count or None,
        "evaluation_length": of,
        "threads": options.threads,
        "device": options.device,
    }


def row(result: bitmill.Result, plan: Plan, source: bool = False) -> dict[str, Any]:
    """Bits and figures of both texts, of the result or of its source."""
    own = result.quality.rows[0] if source else result.row
    texts = {name: own.texts[name].model_dump(mode="json") for name in TEXTS}
    return {"bits": own.bits, "bytes": own.size, "texts": texts} | kept(result.map, plan)


def kept(found: BitWidthMap, plan: Plan) -> dict[str, Any]:
    """Columns that a map keeps: how many linears, how many columns, what they take."""
    rows = {linear.name: linear.rows for linear in plan.linears}
    taken = sum(outlier_bytes(rows[name], count) for name, count in found.outliers.items())
    columns = sum(found.outliers.values())
    return {
        "linears": len(found.outliers),
        "columns": columns,
        "outlier_bits": 8 * taken / plan.weights,
    }


def compared(
    source: Path, profiled: bitmill.ProfiledModel, bits: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Both maps of one budget, refined and measured."""
    folder, given = options.work / f"bits-{bits:g}", settings(options)
    job = bitmill.quantize(
        source,
        bits=bits,
        outliers=tuple(options.outliers),
        out=folder / "job",
        work=folder / "work",
        profiles=options.work / "profiles",
        **given,
    )
    checks = {check.method: check.model_dump(mode="json") for check in job.quality.checks}
    has = bool(job.map.outliers)
    other = bitmill.allocate(profiled, bits=bits, outliers=() if has else tuple(options.outliers))
    beside = bitmill.refine(
        source, other, bits=bits, out=folder / "beside", work=folder / "beside-work", **given
    )
    maps = {"with outliers": job, "without": beside}
    if not has:
        maps = {"without": job, "with outliers": beside}
    rows = {name: row(one, profiled.plan) for name, one in maps.items()}
    return {"checks": checks, "rows": rows, "source": row(job, profiled.plan, True)["texts"]}


def markdown(state: dict[str, Any]) -> str:
    """The tables of a results file."""
    lines = [
        "# Outlier columns against none",
        f"{state['model']}. {state['windows']} Numbers of columns that a linear may keep in 16 "
        f"bits: {state['outliers']}. Command: `{state['command']}`.",
        "",
        f"Machine: {state['machine']}, commit {state['commit']}.",
    ]
    for bits, found in state["bits"].items():
        source = ", ".join(f"{t} {found['source'][t]['perplexity']:.2f}" for t in TEXTS)
        lines += [
            "",
            f"## {bits} bits: source {source}",
            "| map, quantized in haste | bits | predicted loss | KL on held-out windows | taken |",
            "|---|---|---|---|---|",
        ]
        for name, check in found["checks"].items():
            lines.append(
                f"| {name} | {check['bits']:.3f} | {check['predicted_loss']:.3f} "
                f"| {check['kl']:.3f} ± {check['kl_se']:.3f} | {'yes' if check['taken'] else ''} |"
            )
        lines += [
            "",
            "| knapsack's map, refined | true bits | of them outliers | linears with outliers "
            "| columns | wiki perplexity | KL | handbook perplexity | KL |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, one in found["rows"].items():
            texts = " | ".join(
                f"{one['texts'][t]['perplexity']:.2f} "
                f"| {one['texts'][t]['kl']:.3f} ± {one['texts'][t]['kl_se']:.3f}"
                for t in TEXTS
            )
            lines.append(
                f"| {name} | {one['bits']:.4f} | {one['outlier_bits']:.4f} | {one['linears']} "
                f"| {one['columns']} | {texts} |"
            )
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--work", type=Path, default=Path("build/outliers"))
    parser.add_argument("--out", type=Path, default=Path("build/outliers/rows"))
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 3.0])
    parser.add_argument("--outliers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--calibration", type=int, nargs=2, default=(64, 2048))
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--evaluation", type=int, nargs=2, default=(0, 2048), help="0: all windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default="", help="of the code, for the record")
    return parser.parse_args()


def machine(options: argparse.Namespace) -> str:
    """What it ran on."""
    place = f"{os.cpu_count()} CPU cores ({platform.machine()}), {options.threads} threads"
    if options.device != "cpu":
        place = torch.cuda.get_device_name()
    return (
        f"{place}, torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}"
    )


def main() -> None:
    options = arguments()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    (sequences, length), (windows, tokens) = options.calibration, options.evaluation
    state: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "commit": options.commit,
        "model": options.source.name,
        "outliers": ", ".join(map(str, options.outliers)),
        "windows": f"Calibration {sequences} windows of {length} tokens, {options.held_out} more "
        f"held out, evaluation {windows or 'all'} windows of {tokens} of each text.",
        "machine": machine(options),
        "bits": {},
    }
    started = time.perf_counter()
    profiled = bitmill.profile(
        options.source,
        outliers=tuple(options.outliers),
        profiles=options.work / "profiles",
        work=options.work / "profile-work",
        **settings(options),
    )
    print(f"profile {time.perf_counter() - started:.0f} s", flush=True)
    for bits in options.bits:
        state["bits"][f"{bits:g}"] = compared(options.source, profiled, bits, options)
        options.out.with_suffix(".json").write_text(json.dumps(state, indent=1))
        options.out.with_suffix(".md").write_text(markdown(state))
        print(options.out.with_suffix(".md").read_text(), flush=True)


if __name__ == "__main__":
    main()
