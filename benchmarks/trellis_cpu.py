"""Trellis codes on a CPU: a job of the demo's windows by either code, and decoding beside fp32.

    OMP_NUM_THREADS=2 python benchmarks/trellis_cpu.py SOURCE --out benchmarks/results/trellis-cpu

SOURCE is a Hugging Face folder. Each code is quantized by `bitmill quantize` at --bits with the
windows of `bitmill demo` (maps are not measured before one is taken), the whole command timed.
Then the trellis folder and the source in fp32 generate --new-tokens greedily in turn, `RUNS` times
each in one process; seconds are medians, behind one run that warms up.
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
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitmill
from bitmill.io.atomic import read_json, write_bytes, write_json

RUNS = 3
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
    command = [sys.executable, "-P", "-m", "bitmill_service.cli.main", "quantize", source]
    began = time.perf_counter()
    subprocess.run([*command, "--spec", spec, "--out", out], check=True)
    seconds = round(time.perf_counter() - began, 1)
    row = next(row for row in read_json(out / "quality.json")["rows"] if row["method"] != "source")
    text = row["texts"]["wiki_evaluation"]
    return {"seconds": seconds, "bits": row["bits"], "perplexity": text["perplexity"]}


def decoded(source: Path, packed: Path, new_tokens: int) -> dict[str, list[float]]:
    """Tokens a second of both models, run by run."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    models = {
        "fp32": AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        "trellis": bitmill.load(packed, dtype=torch.float32),
    }
    found: dict[str, list[float]] = {name: [] for name in models}
    for run in range(RUNS + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model.generate(
                **inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens
            )
            if run:
                found[name].append(round(new_tokens / (time.perf_counter() - began), 2))
    return found


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--bits", type=float, default=3.18)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--commit", default="", help="of the code, for the record")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        jobs = {
            code: quantized(options.source, code, options.bits, place)
            for code in ("affine", "trellis")
        }
        print(json.dumps(jobs), flush=True)
        speed = decoded(options.source, place / "trellis", options.new_tokens)
    middle = {name: median(runs) for name, runs in speed.items()}
    ratio = {
        "job": round(jobs["trellis"]["seconds"] / jobs["affine"]["seconds"], 2),
        "decode": round(middle["trellis"] / middle["fp32"], 2),
    }
    state = {
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')} python "
        f"benchmarks/trellis_cpu.py {options.source.name}",
        "commit": options.commit,
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {version('torch')}, "
        f"transformers {version('transformers')}, Python {platform.python_version()}",
        "windows": WINDOWS,
        "jobs": jobs,
        "tokens_a_second": speed,
        "ratio": ratio,
    }
    lines = [
        "# Trellis codes on a CPU",
        f"`{state['command']}`, {state['machine']}, commit {options.commit}. The windows of "
        f"`bitmill demo`, {options.bits} bits; {options.new_tokens} tokens decoded greedily.",
        "",
        "| code | true bits | whole job, s | wiki perplexity, 8 windows of 512 |",
        "|---|---|---|---|",
        *(
            f"| {code} | {one['bits']:.3f} | {one['seconds']} | {one['perplexity']:.2f} |"
            for code, one in jobs.items()
        ),
        "",
        f"Trellis over affine: {ratio['job']}. Tokens a second, median of {RUNS}: trellis "
        f"{middle['trellis']}, the source in fp32 {middle['fp32']}, ratio {ratio['decode']}.",
    ]
    write_json(options.out.with_suffix(".json"), state)
    write_bytes(options.out.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
