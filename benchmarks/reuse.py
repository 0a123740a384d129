"""What a sensitivity profile that is made once saves: ten budgets against two full jobs.

    python benchmarks/reuse.py SOURCE --out benchmarks/results/reuse

Runs two whole jobs (knapsack at 3 and at 4 code bits, GPTQ) that share nothing, as without a
profile store, then ten budgets on the first job's profile: each gives a bit-width map, its size and
its predicted loss. Times are wall times of the stages of this one process, so only their ratios
mean anything on another machine. SOURCE is a Hugging Face folder of a Llama-like model;
--blocks N keeps its first N decoder blocks, so that the run stays short.

Recorded: `reuse` = (profile + ten allocations) / two full jobs, and `further_job` = what a whole
job costs that finds its profile in the store (its time without the profile stage) / a full job.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bitmill.allocation.allocator import Allocator
from bitmill.allocation.profile import SensitivityProfile
from bitmill.config.quantization import Budget, QuantizationConfig, parse_config
from bitmill.formats.accounting import footprint
from bitmill.pipeline.job import run_job
from bitmill.plan.model_plan import Plan

JOBS = (3.0, 4.0)
BUDGETS = (2.1, 2.3, 2.5, 2.75, 3.0, 3.25, 3.5, 4.0, 4.5, 5.0)
_BLOCK = re.compile(r"^model\.layers\.(\d+)\.")


def first_blocks(source: Path, folder: Path, blocks: int) -> Path:
    """A copy of the model in `source` that ends after its first decoder blocks."""
    folder.mkdir()
    for file in source.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = blocks
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    kept = {}
    with safe_open(source / "model.safetensors", "pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            found = _BLOCK.match(name)
            if found is None or int(found[1]) < blocks:
                kept[name] = stored.get_tensor(name)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def job_spec(code_bits: float, sequences: int, length: int) -> QuantizationConfig:
    """A job with the defaults, on little text."""
    return parse_config(
        {
            "budget": {"code_bits": code_bits},
            "calibration": {"sequences": sequences, "length": length, "held_out": 1},
            "evaluation": {"sequences": sequences, "length": length},
            "threads": 1,
        }
    )


def run_full_jobs(model: Path, work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Stage times of one job per budget, none of which sees another's files."""
    found = []
    for code_bits in JOBS:
        job = work / f"job-{code_bits:g}"
        begin = time.perf_counter()
        result = run_job(
            job_spec(code_bits, options.sequences, options.length), model, job, job / "out"
        )
        whole = time.perf_counter() - begin
        stages = result.quality.seconds
        found.append({"code_bits": code_bits, "seconds": round(whole, 2), "stages": stages})
        print(f"full job at {code_bits} code bits: {whole:.1f} s {stages}", flush=True)
    return found


def run_budgets(job: Path, spec: QuantizationConfig) -> tuple[float, list[dict[str, Any]]]:
    """Seconds from the stored profile to ten maps, and what each map is."""
    begin = time.perf_counter()
    plan = Plan.model_validate_json((job / "plan" / "plan.json").read_bytes())
    profile = SensitivityProfile.load(job / "profile" / "profile.npz")
    allocator = Allocator(plan, spec.allocation, profile)
    points = []
    for code_bits in BUDGETS:
        chosen = allocator.knapsack(Budget(code_bits=code_bits))
        spent = footprint(plan, chosen)
        points.append(
            {
                "budget": code_bits,
                "code_bits": spent.code_bits,
                "bytes": spent.size,
                "predicted_loss": profile.predicted_loss(chosen.linears),
            }
        )
    return time.perf_counter() - begin, points


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything that is recorded."""
    model = options.source
    if options.blocks:
        model = first_blocks(model, work / "model", options.blocks)
    jobs = run_full_jobs(model, work, options)
    spec = job_spec(JOBS[0], options.sequences, options.length)
    allocation, points = run_budgets(work / f"job-{JOBS[0]:g}", spec)
    profile = jobs[0]["stages"]["profile"]
    two = sum(job["seconds"] for job in jobs)
    blocks = f"first {options.blocks}" if options.blocks else "all"
    further = sum(job["seconds"] - job["stages"]["profile"] for job in jobs)
    return {
        "protocol": f"model {options.source.name}, {blocks} blocks, {options.sequences} "
        f"calibration windows of {options.length} tokens, group 128, "
        f"widths {list(spec.allocation.legal_widths)}",
        "machine": f"{platform.machine()} CPU, 1 thread, torch {torch.__version__}, Python "
        + platform.python_version(),
        "profile_seconds": profile,
        "ten_allocations_seconds": round(allocation, 3),
        "two_full_jobs_seconds": round(two, 2),
        "reuse": round((profile + allocation) / two, 4),
        "further_job": round(further / two, 4),
        "jobs": jobs,
        "budgets": points,
    }


def markdown(found: dict[str, Any]) -> str:
    """The recorded numbers as text."""
    lines = [
        "# One profile, ten budgets",
        f"Protocol: {found['protocol']}. Machine: {found['machine']}. Command: "
        f"`{found['command']}`. All times come from one run; what else the machine did then moves "
        "them, so the ratios are what counts.",
        "",
        "| what | seconds |",
        "|---|---|",
        f"| profile, once | {found['profile_seconds']:.1f} |",
        "| ten budgets on it: map, size, predicted loss "
        f"| {found['ten_allocations_seconds']:.3f} |",
        f"| two full jobs that share nothing | {found['two_full_jobs_seconds']:.1f} |",
        "",
        f"(profile + ten budgets) / two full jobs = **{found['reuse']:.3f}**. A budget here means "
        "a map with its size and predicted loss: none of the ten maps is refined, packed or "
        "evaluated. A whole further job that finds its profile in the store takes "
        f"**{found['further_job']:.3f}** of a full job.",
        "",
        "| full job, code bits | seconds | stages |",
        "|---|---|---|",
    ]
    for job in found["jobs"]:
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in job["stages"].items())
        lines.append(f"| {job['code_bits']:g} | {job['seconds']:.1f} | {stages} |")
    lines += ["", "| budget, code bits | spent | bytes | predicted loss, nats/token |"]
    lines.append("|---|---|---|---|")
    for point in found["budgets"]:
        lines.append(
            f"| {point['budget']:g} | {point['code_bits']:.4f} | {point['bytes']:,} "
            f"| {point['predicted_loss']:.4g} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--blocks", type=int, default=0, help="keep the first N blocks; 0: all")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    found["command"] = (
        f"python benchmarks/reuse.py {options.source.name} --blocks {options.blocks} "
        f"--sequences {options.sequences} --length {options.length}"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(found))
    print(f"reuse {found['reuse']}, further job {found['further_job']}")


if __name__ == "__main__":
    main()
