"""Trellis codes on a CPU: a job of the demo's windows by either code, and decoding beside fp32.

    OMP_NUM_THREADS=2 python benchmarks/trellis_cpu.py SOURCE --out benchmarks/results/trellis-cpu

SOURCE is a Hugging Face folder. Each code is quantized by `bitmill quantize` at --bits with the
windows of `bitmill demo` (maps are not measured before one is taken), the whole command timed.
Then the trellis folder and the source in fp32 generate --new-tokens greedily in turn, `RUNS` times
each in one process, behind one run that warms up: with all threads by the clock, and with one
thread by the processor's time, which other work on the machine does not lengthen. --packed names a
trellis folder that is there: it alone is decoded, and the record that --out names keeps its jobs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitmill
from bitmill.io.atomic import read_json, write_bytes, write_json

RUNS = 5
CODES = ("affine", "trellis")
PROMPT = "A water mill is a machine that"
WINDOWS = {
    "calibration": {"sequences": 8, "held_out": 2, "length": 512},
    "evaluation": {"texts": ["wiki_evaluation"], "sequences": 8, "length": 512},
    "allocation": {"check": "off"},
}


def quantized(source: Path, code: str, bits: float, place: Path) -> dict[str, Any]:
    """One job: wall seconds, and what its report says."""
    out, spec = place / code, place / f"{code}.json"
    write_json(spec, WINDOWS | {"code": code, "budget": {"bits": bits}})
    command = [sys.executable, "-P", "-m", "bitmill_service.cli.main", "quantize", str(source)]
    began = time.perf_counter()
    subprocess.run([*command, "--spec", spec, "--out", out], check=True)
    seconds = round(time.perf_counter() - began, 1)
    row = measured(out)
    text = row["texts"]["wiki_evaluation"]
    return {"seconds": seconds, "bits": row["bits"], "perplexity": text["perplexity"]}


def measured(packed: Path) -> dict[str, Any]:
    """What a job's report says of the folder that it made."""
    rows: list[dict[str, Any]] = read_json(packed / "quality.json")["rows"]
    return next(row for row in rows if row["method"] != "source")


def decoded(source: Path, packed: Path, new_tokens: int) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of both models, run by run, by the number of threads."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    models = {
        "fp32": AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        "trellis": bitmill.load(packed, dtype=torch.float32),
    }
    return {
        "all": _in_turn(models, inputs, new_tokens, time.perf_counter),
        "one": _in_turn(models, inputs, new_tokens, time.process_time, threads=1),
    }


def _in_turn(
    models: Mapping[str, Any],
    inputs: Mapping[str, torch.Tensor],
    new_tokens: int,
    clock: Callable[[], float],
    threads: int | None = None,
) -> dict[str, list[float]]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    found: dict[str, list[float]] = {name: [] for name in models}
    for run in range(RUNS + 1):
        for name, model in models.items():
            began = clock()
            model.generate(
                **inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens
            )
            if run:
                found[name].append(round(new_tokens / (clock() - began), 2))
    torch.set_num_threads(before)
    return found


def _run(arguments: str, commit: str) -> dict[str, str]:
    """Where figures come from."""
    return {
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')} python "
        f"benchmarks/trellis_cpu.py {arguments}",
        "commit": commit,
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}), torch {version('torch')}, "
        f"transformers {version('transformers')}, Python {platform.python_version()}",
    }


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--bits", type=float, default=3.18)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--packed", type=Path, help="a trellis folder: decode it, run no job")
    parser.add_argument("--commit", default="", help="of the code, for the record")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    options = parser.parse_args()
    source, packed = options.source, options.packed
    with tempfile.TemporaryDirectory() as scratch:
        if packed is None:
            place = Path(scratch)
            rows = {code: quantized(source, code, options.bits, place) for code in CODES}
            jobs = _run(source.name, options.commit) | {"windows": WINDOWS, "rows": rows}
            print(json.dumps(jobs), flush=True)
            packed = place / "trellis"
        else:
            jobs = read_json(options.out.with_suffix(".json"))["jobs"]
        speed = decoded(source, packed, options.new_tokens)
        bits = measured(packed)["bits"]
    arguments = source.name if options.packed is None else f"{source.name} --packed {packed.name}"
    decode = _run(arguments, options.commit) | {
        "bits": bits,
        "new_tokens": options.new_tokens,
        "tokens_a_second": speed,
    }
    lines = _report(jobs, decode)
    write_json(options.out.with_suffix(".json"), {"jobs": jobs, "decode": decode})
    write_bytes(options.out.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


def _report(jobs: Mapping[str, Any], decode: Mapping[str, Any]) -> list[str]:
    rows = jobs["rows"]
    ratio = rows["trellis"]["seconds"] / rows["affine"]["seconds"]
    table, speed = [], decode["tokens_a_second"]
    for threads, of_model in speed.items():
        fp32, trellis = median(of_model["fp32"]), median(of_model["trellis"])
        table.append(f"| {threads} | {fp32:.1f} | {trellis:.1f} | {trellis / fp32:.2f} |")
    runs = len(speed["all"]["fp32"])
    return [
        "# Trellis codes on a CPU",
        "## Jobs",
        f"`{jobs['command']}`, {jobs['machine']}, commit {jobs['commit']}. The windows of "
        "`bitmill demo`.",
        "",
        "| code | true bits | whole job, s | wiki perplexity, 8 windows of 512 |",
        "|---|---|---|---|",
        *(
            f"| {code} | {one['bits']:.3f} | {one['seconds']} | {one['perplexity']:.2f} |"
            for code, one in rows.items()
        ),
        "",
        f"Trellis over affine: {ratio:.2f}.",
        "",
        "## Decoding",
        f"`{decode['command']}`, {decode['machine']}, commit {decode['commit']}. Tokens a second, "
        f"{decode['new_tokens']} new ones at batch 1, median of {runs} runs in turn, trellis at "
        f"{decode['bits']:.3f} true bits: all threads by the clock, one by the processor's time.",
        "",
        "| threads | source in fp32 | trellis | ratio |",
        "|---|---|---|---|",
        *table,
    ]


if __name__ == "__main__":
    main()
