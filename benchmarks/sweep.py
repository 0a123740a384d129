"""What sharing stages saves: a sweep against the same jobs one by one.

    python benchmarks/sweep.py SOURCE --out benchmarks/results/sweep

SOURCE is a model's folder or a GGUF file. The grid is 2 calibration texts x 2 refinements x 3
budgets (--smoke: 1 x 2 x 2, windows of 256 tokens). `bitmill sweep` runs it; then every cell runs
alone, with `bitmill quantize` and no profiles kept. All times are wall times of whole commands,
their start included, on this machine and with nothing else on it.

Recorded: `ratio` = seconds of the sweep / sum of the seconds of its cells alone, and whether both
made the same weights.
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
from pathlib import Path
from typing import Any

from bitmill.io.manifest import read_manifest
from bitmill_workers.sweep_spec import parse_sweep

BITMILL = [sys.executable, "-P", "-m", "bitmill_service.cli.main"]


def spec(source: Path, smoke: bool) -> dict[str, Any]:
    """The sweep as JSON."""
    gguf = {"file": source.name} if source.suffix == ".gguf" else {}
    folder = source.parent if gguf else source
    length = 256 if smoke else 1024
    texts = ["wiki_calibration", "mixture_calibration"][: 1 if smoke else 2]
    return {
        "job": {
            "model": {"source": "path", "path": str(folder.resolve())} | gguf,
            "calibration": {"sequences": 4 if smoke else 16, "length": length, "held_out": 2},
            "evaluation": {"texts": ["wiki_evaluation"], "sequences": 2, "length": length},
        },
        "grid": {
            "calibration.text": [{"source": "bundled", "name": name} for name in texts],
            "refinement.method": ["rtn", "gptq"],
            "budget.code_bits": [2.5, 3] if smoke else [2.5, 3, 4],
        },
    }


def timed(*arguments: str) -> float:
    """Seconds of a command, which must succeed."""
    begin = time.monotonic()
    subprocess.run([*BITMILL, *arguments], check=True, stdout=subprocess.DEVNULL)
    return round(time.monotonic() - begin, 1)


def run(source: Path, smoke: bool, device: str) -> dict[str, Any]:
    """Both ways, and what they took."""
    asked = spec(source, smoke)
    alone: dict[str, float] = {}
    same = True
    with tempfile.TemporaryDirectory(prefix="bitmill-sweep-") as scratch:
        place = Path(scratch)
        file = place / "sweep.yaml"
        file.write_text(json.dumps(asked))
        options = ["--device", device]
        swept = timed("sweep", str(file), "--out", str(place / "sweep"), *options)
        for cell in parse_sweep(asked).cells():
            job = place / "job.json"
            job.write_text(cell.spec.model_dump_json(exclude_none=True))
            out = place / f"alone-{cell.number}"
            alone[cell.name] = timed("quantize", "--spec", str(job), "--out", str(out), *options)
            shared = read_manifest(place / "sweep" / f"cell-{cell.number:02d}").files
            names = [name for name in shared if name.endswith(".safetensors")]
            theirs = read_manifest(out).files
            same &= all(shared[name] == theirs[name] for name in names)
    return {
        "model": source.name,
        "smoke": smoke,
        "device": device,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "sweep_s": swept,
        "alone_s": alone,
        "sum_alone_s": round(sum(alone.values()), 1),
        "ratio": round(swept / sum(alone.values()), 3),
        "same_weights": same,
    }


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    found = run(options.source, options.smoke, options.device)
    text = json.dumps(found, indent=1)
    print(text)
    if options.out is not None:
        options.out.with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
