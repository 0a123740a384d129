"""A choice that an allocation may take against the same without it, at the same true bits.

    python benchmarks/choices.py dropped_groups SOURCE --out benchmarks/results/dropped_groups
    python benchmarks/choices.py outliers SOURCE --out benchmarks/results/outliers

`dropped_groups` allows the width 0, `outliers` columns that are kept in 16 bits. One profile with
the costs of both sides serves all. For every budget a job that may take the choice measures the
knapsack's maps with and without it on held-out windows and refines the one of least KL; the other
of the two is refined by the same settings beside it. Both evaluation texts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import bitmill
from bitmill.config.bit_width_map import BitWidthMap, outlier_bytes
from bitmill.config.codes import CODES
from bitmill.plan.model_plan import Plan

TEXTS = ("wiki_evaluation", "handbook_evaluation")
WIDTHS = CODES["affine"].legal
COLUMNS = (1, 4)


@dataclass(frozen=True)
class Choice:
    """What may be taken, and how a map tells that it was."""

    title: str
    rows: tuple[str, str]
    """Names of the maps with it and without."""
    allowed: dict[str, Any]
    """What a profile, and an allocation that may take it, are given."""
    refused: dict[str, Any]
    """What an allocation that may not take it is given."""
    bits: tuple[float, ...]
    taken: Callable[[BitWidthMap], bool]
    told: Callable[[BitWidthMap, Plan], dict[str, str]]
    """What a map is told by: cells of the table, by their column's head."""


def shares(found: BitWidthMap, _: Plan) -> dict[str, str]:
    """Share of groups by width."""
    widths = [width for groups in found.linears.values() for width in groups]
    each = {width: widths.count(width) / len(widths) for width in sorted(set(widths))}
    return {"groups of each width": ", ".join(f"{w}: {100 * s:.1f} %" for w, s in each.items())}


def columns(found: BitWidthMap, plan: Plan) -> dict[str, str]:
    """Columns that a map keeps: what they take, how many linears have some, how many they are."""
    rows = {linear.name: linear.rows for linear in plan.linears}
    taken = sum(outlier_bytes(rows[name], count) for name, count in found.outliers.items())
    return {
        "of them outliers": f"{8 * taken / plan.weights:.4f}",
        "linears with outliers": str(len(found.outliers)),
        "columns": str(sum(found.outliers.values())),
    }


CHOICES = {
    "dropped_groups": Choice(
        title="Width 0 against widths from 1",
        rows=("with width 0", "widths from 1"),
        allowed={"widths": WIDTHS},
        refused={"widths": WIDTHS[1:]},
        bits=(1.5, 2.0),
        taken=lambda found: any(0 in widths for widths in found.linears.values()),
        told=shares,
    ),
    "outliers": Choice(
        title=f"Outlier columns ({' or '.join(map(str, COLUMNS))} of a linear) against none",
        rows=("with outliers", "without"),
        allowed={"outliers": COLUMNS},
        refused={"outliers": ()},
        bits=(2.5, 3.0),
        taken=lambda found: bool(found.outliers),
        told=columns,
    ),
}


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


def row(result: bitmill.Result, source: bool = False) -> dict[str, Any]:
    """Bits and figures of both texts, of the result or of its source."""
    own = result.quality.rows[0] if source else result.row
    texts = {name: own.texts[name].model_dump(mode="json") for name in TEXTS}
    return {"bits": own.bits, "bytes": own.size, "texts": texts}


def compared(
    profiled: bitmill.ProfiledModel, bits: float, choice: Choice, options: argparse.Namespace
) -> dict[str, Any]:
    """Both maps of one budget, refined and measured."""
    folder, given = options.work / f"bits-{bits:g}", settings(options)
    job = bitmill.quantize(
        options.source,
        bits=bits,
        out=folder / "job",
        work=folder / "work",
        profiles=options.work / "profiles",
        **choice.allowed,
        **given,
    )
    checks = {check.method: check.model_dump(mode="json") for check in job.quality.checks}
    taken = choice.taken(job.map)
    other = bitmill.allocate(profiled, bits=bits, **(choice.refused if taken else choice.allowed))
    beside = bitmill.refine(
        options.source,
        other,
        bits=bits,
        out=folder / "beside",
        work=folder / "beside-work",
        **given,
    )
    maps = dict(zip(choice.rows, (job, beside) if taken else (beside, job), strict=True))
    rows = {
        name: row(one) | {"told": choice.told(one.map, profiled.plan)} for name, one in maps.items()
    }
    return {"checks": checks, "rows": rows, "source": row(job, source=True)["texts"]}


def markdown(state: dict[str, Any]) -> str:
    """The tables of a results file."""
    lines = [
        f"# {state['title']}",
        f"{state['model']}. {state['windows']} Command: `{state['command']}`.",
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
        heads = list(next(iter(found["rows"].values()))["told"])
        lines += [
            "",
            f"| knapsack's map, refined | true bits | {' | '.join(heads)} "
            "| wiki perplexity | KL | handbook perplexity | KL |",
            "|---" * (len(heads) + 6) + "|",
        ]
        for name, one in found["rows"].items():
            texts = " | ".join(
                f"{one['texts'][t]['perplexity']:.2f} "
                f"| {one['texts'][t]['kl']:.3f} ± {one['texts'][t]['kl_se']:.3f}"
                for t in TEXTS
            )
            told = " | ".join(one["told"].values())
            lines.append(f"| {name} | {one['bits']:.4f} | {told} | {texts} |")
    return "\n".join(lines) + "\n"


def machine(options: argparse.Namespace) -> str:
    """What it ran on."""
    place = f"{os.cpu_count()} CPU cores ({platform.machine()}), {options.threads} threads"
    if options.device != "cpu":
        place = torch.cuda.get_device_name()
    return (
        f"{place}, torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}"
    )


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("choice", choices=CHOICES)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--work", type=Path, default=Path("build/choices"))
    parser.add_argument("--out", type=Path, default=Path("build/choices/rows"))
    parser.add_argument("--bits", type=float, nargs="+", help="the choice's two where left out")
    parser.add_argument("--calibration", type=int, nargs=2, default=(64, 2048))
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--evaluation", type=int, nargs=2, default=(0, 2048), help="0: all windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default="", help="of the code, for the record")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    choice = CHOICES[options.choice]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    (sequences, length), (windows, tokens) = options.calibration, options.evaluation
    state: dict[str, Any] = {
        "title": choice.title,
        "command": " ".join(["python", *sys.argv]),
        "commit": options.commit,
        "model": options.source.name,
        "windows": f"Calibration {sequences} windows of {length} tokens, {options.held_out} more "
        f"held out, evaluation {windows or 'all'} windows of {tokens} of each text.",
        "machine": machine(options),
        "bits": {},
    }
    started = time.perf_counter()
    profiled = bitmill.profile(
        options.source,
        profiles=options.work / "profiles",
        work=options.work / "profile-work",
        **choice.allowed,
        **settings(options),
    )
    print(f"profile {time.perf_counter() - started:.0f} s", flush=True)
    for bits in options.bits or choice.bits:
        state["bits"][f"{bits:g}"] = compared(profiled, bits, choice, options)
        options.out.with_suffix(".json").write_text(json.dumps(state, indent=1))
        options.out.with_suffix(".md").write_text(markdown(state))
        print(options.out.with_suffix(".md").read_text(), flush=True)


if __name__ == "__main__":
    main()
