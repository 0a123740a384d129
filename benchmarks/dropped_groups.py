"""Width 0 allowed against widths from 1, at the same true bits: what dropping groups is worth.

    python benchmarks/dropped_groups.py SOURCE --work WORK --out benchmarks/results/dropped_groups

One profile with width 0 serves all. For every budget a job whose groups may be dropped measures the
knapsack's maps with and without width 0 on held-out windows and refines the one of least KL; the
best map without width 0, or with it where the job took none, is refined by the same settings beside
it. Both evaluation texts.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import bitmill
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.codes import CODES

TEXTS = ("wiki_evaluation", "handbook_evaluation")
WIDTHS = CODES["affine"].legal


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
    }


def row(result: bitmill.Result, source: bool = False) -> dict[str, Any]:
    """Bits and figures of both texts, of the result or of its source."""
    own = result.quality.rows[0] if source else result.row
    texts = {name: own.texts[name].model_dump(mode="json") for name in TEXTS}
    return {"bits": own.bits, "bytes": own.size, "texts": texts}


def shares(found: BitWidthMap) -> dict[str, float]:
    """Share of groups by width."""
    widths = [width for groups in found.linears.values() for width in groups]
    return {str(width): widths.count(width) / len(widths) for width in sorted(set(widths))}


def compared(
    source: Path, profiled: bitmill.ProfiledModel, bits: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Both maps of one budget, refined and measured."""
    folder, given = options.work / f"bits-{bits:g}", settings(options)
    job = bitmill.quantize(
        source,
        bits=bits,
        widths=WIDTHS,
        out=folder / "job",
        work=folder / "work",
        profiles=options.work / "profiles",
        **given,
    )
    checks = {check.method: check.model_dump(mode="json") for check in job.quality.checks}
    dropped = any(0 in widths for widths in job.map.linears.values())
    other = bitmill.allocate(profiled, bits=bits, widths=WIDTHS[1:] if dropped else WIDTHS)
    beside = bitmill.refine(
        source, other, bits=bits, out=folder / "beside", work=folder / "beside-work", **given
    )
    maps = {"with width 0": job, "widths from 1": beside}
    if not dropped:
        maps = {"widths from 1": job, "with width 0": beside}
    rows = {name: row(one) | {"shares": shares(one.map)} for name, one in maps.items()}
    return {"checks": checks, "rows": rows, "source": row(job, source=True)["texts"]}


def markdown(state: dict[str, Any]) -> str:
    """The tables of a results file."""
    lines = [
        "# Width 0 against widths from 1",
        f"{state['windows']} Command: `{state['command']}`.",
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
            "| knapsack's map, refined | true bits | groups of each width "
            "| wiki perplexity | KL | handbook perplexity | KL |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, one in found["rows"].items():
            spread = ", ".join(f"{w}: {100 * share:.1f} %" for w, share in one["shares"].items())
            texts = " | ".join(
                f"{one['texts'][t]['perplexity']:.2f} "
                f"| {one['texts'][t]['kl']:.3f} ± {one['texts'][t]['kl_se']:.3f}"
                for t in TEXTS
            )
            lines.append(f"| {name} | {one['bits']:.3f} | {spread} | {texts} |")
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--work", type=Path, default=Path("build/dropped_groups"))
    parser.add_argument("--out", type=Path, default=Path("build/dropped_groups/rows"))
    parser.add_argument("--bits", type=float, nargs="+", default=[1.5, 2.0])
    parser.add_argument("--calibration", type=int, nargs=2, default=(64, 2048))
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--evaluation", type=int, nargs=2, default=(0, 2048), help="0: all windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--commit", default="", help="of the code, for the record")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    (sequences, length), (windows, tokens) = options.calibration, options.evaluation
    state: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "commit": options.commit,
        "windows": f"Calibration {sequences} windows of {length} tokens, {options.held_out} more "
        f"held out, evaluation {windows or 'all'} windows of {tokens} of each text.",
        "machine": f"2 CPU cores ({platform.machine()}), {options.threads} thread, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}",
        "bits": {},
    }
    started = time.perf_counter()
    profiled = bitmill.profile(
        options.source,
        widths=WIDTHS,
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
