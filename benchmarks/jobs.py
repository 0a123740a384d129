"""Whole jobs on one real model side by side: quality, true bits and seconds of each.

    python benchmarks/jobs.py SOURCE --device cuda --out OUT --work WORK NAME=JSON ...

SOURCE is a Hugging Face folder or a GGUF file. Each NAME=JSON is a specification without a model,
for example 'balanced-3={"budget": {"bits": 3}, "effort": "balanced"}'. Jobs run one after another
through the library as any user's would, with one store of profiles; a job whose row is in OUT.json
is not run again. Seconds are those of the process, without start-up, and share a profile that an
earlier job made. OUT.md has the table:

    excess = ln(perplexity / perplexity of the source), per text and their mean

Several commands may run side by side on one device, with OUT and WORK of their own; their seconds
then say little. With one folder --stages, none waits for what another makes but for equal stages.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from bitmill.config.quantization import parse_config
from bitmill.io.atomic import write_bytes, write_json
from bitmill.pipeline.job import run_job
from bitmill.results import QualityReport, QualityRow


def run(args: argparse.Namespace, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """One job and its row."""
    source = args.source
    folder, gguf = (source.parent, source.name) if source.is_file() else (source, None)
    config = parse_config(spec)
    begin = time.perf_counter()
    made = run_job(
        config,
        folder,
        args.work / name,
        args.work / f"{name}-out",
        gguf=gguf,
        profile_folder=args.work / "profiles",
        stage_folder=args.stages,
        device=args.device,
    )
    return row_of(made.quality, time.perf_counter() - begin) | {"spec": spec}


def row_of(report: QualityReport, seconds: float) -> dict[str, Any]:
    """What the table shows of a report."""
    source, *_, ours = report.rows
    return {
        "bits": ours.bits,
        "code_bits": ours.code_bits,
        "size": ours.size,
        **row_of_texts(source, ours),
        "predicted_loss": ours.predicted_loss,
        "seconds": seconds,
        "stage_seconds": report.seconds,
        "warnings": list(report.warnings),
    }


def row_of_texts(source: QualityRow, ours: QualityRow) -> dict[str, Any]:
    """What was measured on the evaluation texts."""
    excess = {
        text: math.log(found.perplexity / source.texts[text].perplexity)
        for text, found in ours.texts.items()
    }
    return {
        "perplexity": {text: found.perplexity for text, found in ours.texts.items()},
        "source_perplexity": {text: found.perplexity for text, found in source.texts.items()},
        "kl": {text: found.kl for text, found in ours.texts.items()},
        "kl_se": {text: found.kl_se for text, found in ours.texts.items()},
        "excess": excess,
        "mean_excess": sum(excess.values()) / len(excess),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    texts = list(next(iter(rows.values()))["excess"])
    head = ["job", "bits", *(f"ppl {text}" for text in texts), *(f"excess {t}" for t in texts)]
    head += ["mean excess", "seconds"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, row in rows.items():
        cells = [name, f"{row['bits']:.3f}"]
        cells += [f"{row['perplexity'][text]:.2f}" for text in texts]
        cells += [f"{row['excess'][text]:.4f}" for text in texts]
        cells += [f"{row['mean_excess']:.4f}", f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("jobs", nargs="+", metavar="NAME=JSON")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stages", type=Path, help="where commands make equal stages once")
    args = parser.parse_args()
    stored = args.out.with_suffix(".json")
    found = json.loads(stored.read_text()) if stored.exists() else {"rows": {}}
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    found["machine"] = {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for job in args.jobs:
        name, _, text = job.partition("=")
        if name not in found["rows"]:
            found["rows"][name] = run(args, name, json.loads(text))
            write_json(stored, found)
            write_bytes(args.out.with_suffix(".md"), (table(found["rows"]) + "\n").encode())
    print(table(found["rows"]))


if __name__ == "__main__":
    main()
