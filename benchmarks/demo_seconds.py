"""Processor seconds of `bitmill demo` for two checkouts in turn, and whether their bytes are equal.

    python benchmarks/demo_seconds.py --base CHECKOUT [--runs 3] [--python .venv/bin/python]

Runs base and this checkout one after the other, `runs` times each, in fresh folders, and writes
`results/demo-seconds.md`. Processor seconds are user and system time of the demo with all processes
that it started, also of those that outlive their parent. Wants a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parents[1]
RESULT = HERE / "benchmarks/results/demo-seconds.md"
FOLDERS = ("kernels", "quant_core", "workers", "service")
COMPARED = ("model.safetensors", "bit_width_map.json")
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Run:
    """Seconds of one demo, and the SHA-256 of what it packed."""

    processor: float
    wall: float
    hashes: dict[str, str]


def run_demo(checkout: Path, python: Path, options: list[str]) -> Run:
    """Run the demo of this checkout to its end; raises where it fails."""
    script = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = script["bitmill"].partition(":")
    program = f"from {module} import {function}; {function}()"
    ours = ("BITMILL_", "OMP_", "MKL_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment["PYTHONPATH"] = ":".join(str(checkout / folder) for folder in FOLDERS)
    with tempfile.TemporaryDirectory(prefix="demo-seconds-") as folder:
        out = Path(folder, "out")
        line = [str(python), "-P", "-c", program, "demo", "--json", "--out", str(out), *options]
        used, began = _children(), time.monotonic()
        subprocess.run(line, check=True, env=environment, stdout=subprocess.DEVNULL)
        wall = time.monotonic() - began
        with suppress(ChildProcessError):
            while True:
                os.wait()
        packed = {name: (out / "checkpoint" / name).read_bytes() for name in COMPARED}
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in packed.items()}
        return Run(_children() - used, wall, hashes)


def _children() -> float:
    """User and system seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def commit_of(checkout: Path) -> str:
    """The checkout's commit, marked where files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def report(names: tuple[str, str], runs: tuple[list[Run], list[Run]]) -> str:
    """The result as Markdown; base first."""
    seconds = [[run.processor for run in mine] for mine in runs]
    ratio = median(seconds[1]) / median(seconds[0])
    lines = [
        "# Processor seconds of `bitmill demo`",
        f"Command: `python benchmarks/demo_seconds.py --base CHECKOUT --runs {len(runs[0])}`. "
        f"Machine: {platform.machine()}, {_processor()}, {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}; "
        f"{time.strftime('%Y-%m-%d')}.",
        "",
        "| commit | processor seconds | median | wall seconds, median |",
        "|---|---|---:|---:|",
    ]
    for name, mine, used in zip(names, runs, seconds, strict=True):
        each = ", ".join(f"{value:.1f}" for value in used)
        wall = median(run.wall for run in mine)
        lines.append(f"| {name} | {each} | {median(used):.1f} | {wall:.1f} |")
    lines += ["", f"Ratio of the medians: {ratio:.3f}.", "", "| file | commit | SHA-256 |"]
    lines += ["|---|---|---|"]
    for file in COMPARED:
        for name, mine in zip(names, runs, strict=True):
            found = sorted({run.hashes[file] for run in mine})
            lines.append(f"| `{file}` | {name} | {', '.join(found)} |")
    same = len({tuple(run.hashes.items()) for mine in runs for run in mine}) == 1
    lines += ["", f"The packed bytes of all runs are {'equal' if same else 'NOT equal'}.", ""]
    return "\n".join(lines)


def _processor() -> str:
    names = [
        x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")
    ]
    return names[0].partition(":")[2].strip() if names else "unknown processor"


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--python", type=Path, default=Path(sys.executable))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", type=Path, help="another model folder, to try this script out")
    parser.add_argument("--result", type=Path, default=RESULT, help="file to write")
    options = parser.parse_args()
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise SystemExit("processes that outlive their parent cannot be waited for here")
    given = ["--model", str(options.model.resolve())] if options.model else []
    checkouts = (options.base.resolve(), HERE)
    names = (f"{commit_of(checkouts[0])} (base)", commit_of(checkouts[1]))
    runs: tuple[list[Run], list[Run]] = ([], [])
    for _ in range(options.runs):
        for name, checkout, mine in zip(names, checkouts, runs, strict=True):
            mine.append(run_demo(checkout, options.python.absolute(), given))
            print(f"{name}: {mine[-1].processor:.1f} s", file=sys.stderr)
    options.result.write_text(report(names, runs))
    print(options.result.read_text())


if __name__ == "__main__":
    main()
