"""What sharing stages saves: a sweep against the same jobs one by one.

    python benchmarks/sweep.py SOURCE --out benchmarks/results/sweep

SOURCE is a model's folder or a GGUF file. The grid is calibration texts (two, or --texts) x 2
methods of allocation x 3 budgets, refined by --refine after --sequences windows of --length tokens.
`bitmill sweep` runs it; then every cell runs alone, with `bitmill quantize` and no profiles kept.
Maps are not measured before they are taken (`check` is off). All times are those of whole commands,
their start and every process that they start included, by the clock and, where other programs use
the machine too, better in seconds of CPU. --at-once N has N commands run side by side, the sweep
among them; the clock then says little.

Recorded: `ratio` = time of the sweep / sum of the times of its cells alone, whether both made the
same weights, and in `cells` what the sweep's table says of each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bitmill.io.manifest import read_manifest
from bitmill_workers.sweep_spec import parse_sweep

QUIET = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
BITMILL = [sys.executable, "-P", "-m", "bitmill_service.cli.main"]


def spec(
    source: Path, refine: str, sequences: int, length: int, texts: list[str]
) -> dict[str, Any]:
    """The sweep as JSON."""
    gguf = {"file": source.name} if source.suffix == ".gguf" else {}
    folder = source.parent if gguf else source
    return {
        "job": {
            "model": {"source": "path", "path": str(folder.resolve())} | gguf,
            "calibration": {"sequences": sequences, "length": length, "held_out": 2},
            "allocation": {"check": "off"},
            "refinement": {"method": refine},
            "evaluation": {
                "texts": ["wiki_evaluation", "handbook_evaluation"],
                "sequences": 2,
                "length": length,
            },
        },
        "grid": {
            "calibration.text": [{"source": "bundled", "name": name} for name in texts],
            "allocation.method": ["uniform", "knapsack"],
            "budget.code_bits": [2, 3, 4],
        },
    }


def timed(*arguments: str) -> dict[str, float]:
    """Wall and CPU seconds of a command and all that it starts; it must succeed."""
    begin = time.monotonic()
    pid = os.posix_spawn(BITMILL[0], [*BITMILL, *arguments], os.environ, file_actions=[QUIET])
    _, status, used = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"bitmill {' '.join(arguments)} ended with status {status}")
    taken = time.monotonic() - begin
    found = {"wall_s": round(taken, 1), "cpu_s": round(used.ru_utime + used.ru_stime, 1)}
    print(" ".join(arguments[:5]), found, file=sys.stderr, flush=True)
    return found


def run(source: Path, asked: dict[str, Any], device: str, at_once: int) -> dict[str, Any]:
    """Both ways, and what they took."""
    cells_asked = parse_sweep(asked).cells()
    with (
        tempfile.TemporaryDirectory(prefix="bitmill-sweep-") as scratch,
        ThreadPoolExecutor(at_once) as pool,
    ):
        place = Path(scratch)
        file = place / "sweep.yaml"
        file.write_text(json.dumps(asked))
        options = ["--device", device]
        sweeping = pool.submit(timed, "sweep", str(file), "--out", str(place / "sweep"), *options)
        begun = {}
        for cell in cells_asked:
            job = place / f"job-{cell.number}.json"
            job.write_text(cell.spec.model_dump_json(exclude_none=True))
            given = ["--spec", str(job), "--out", str(place / f"alone-{cell.number}"), *options]
            begun[cell.name] = pool.submit(timed, "quantize", *given)
        alone = {name: one.result() for name, one in begun.items()}
        swept = sweeping.result()
        same = all(
            weights(place / "sweep" / f"cell-{cell.number:02d}")
            == weights(place / f"alone-{cell.number}")
            for cell in cells_asked
        )
        cells = json.loads((place / "sweep" / "table.json").read_text())
    return {
        "job": asked["job"] | {"model": source.name},
        "device": device,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": version("torch"),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "at_once": at_once,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "sweep": swept,
        "alone": alone,
        "ratio": {
            kind: round(taken / sum(one[kind] for one in alone.values()), 3)
            for kind, taken in swept.items()
        },
        "same_weights": same,
        "cells": cells,
    }


def weights(folder: Path) -> dict[str, Any]:
    """Files of weights, by name, as the manifest has them."""
    files = read_manifest(folder).files
    return {name: file for name, file in files.items() if name.endswith(".safetensors")}


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--refine", default="gptq", choices=["rtn", "gptq", "omniquant"])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--texts", nargs="+", default=["wiki_calibration", "mixture_calibration"])
    parser.add_argument("--at-once", type=int, default=1, help="commands side by side")
    options = parser.parse_args()
    asked = spec(options.source, options.refine, options.sequences, options.length, options.texts)
    found = run(options.source, asked, options.device, options.at_once)
    text = json.dumps(found, indent=1)
    print(text)
    if options.out is not None:
        options.out.with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
