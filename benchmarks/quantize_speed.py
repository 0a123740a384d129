"""How long a whole job takes: profile, allocate, refine and pack of a model of a real shape.

    python benchmarks/quantize_speed.py --shape llama-7b --blocks 4 --device cuda --devices 2

A checkpoint of N decoder blocks with random weights (normal, with outlier channels in the norms) is
written to a temporary folder and run through the job's own stages. Windows are random tokens. Every
decoder block of a stage is one unit; a unit's seconds are split by what the library was doing. All
blocks of the shape are extrapolated: what was measured, plus the median of the units behind the
first (which compiles kernels) for each block that is missing, and the forward passes that a
backward pass through all blocks would repeat. A unit of refinement ends when its block is saved,
early in the turn of the next one; the last one, which lacks that, is left out of the median too.

With several devices the times are the first rank's, which waits for the others at every sum; memory
is that of one rank.

Random activations cost what real ones cost: no kernel's work depends on values. Quality is not
measured here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from safetensors.torch import save_file

from bitmill.calibration.block_inputs import (
    choose_every,
    least_inputs,
)
from bitmill.calibration.gradients import PassSettings, input_room
from bitmill.calibration.loss_weights import LossWeights, loss_weights
from bitmill.calibration.windows import CalibrationSet
from bitmill.config.quantization import QuantizationConfig, parse_config
from bitmill.pipeline.estimate import Machine, estimate
from bitmill.pipeline.job import Job
from bitmill.pipeline.progress import Progress
from bitmill.pipeline.workspace import Workspace
from bitmill.plan.model_plan import Plan
from bitmill.refinement import model as refinement
from bitmill.runtime.launch import as_rank, is_rank, run_ranks
from bitmill.runtime.memory import free_device_bytes, spare_host_bytes
from bitmill.runtime.process import computing
from bitmill.runtime.ranks import Ranks
from bitmill.runtime.timer import Recorder

OUTLIERS = 0.002
"""Share of a norm's channels that are ten times larger."""

MEMORY_SAMPLES_PER_SECOND = 20

WEIGHTS = "loss weights"
"""Units of the passes before refinement's first block, which no block's times hold."""


@dataclass(frozen=True)
class Shape:
    """A Llama-like model; blocks: of the real model."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    blocks: int
    vocabulary: int = 32000

    def config(self, blocks: int, tokens: int) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": tokens,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "llama-7b": Shape(4096, 11008, 32, 32, 32),
    "llama-70b": Shape(8192, 28672, 64, 8, 80),
    "smollm2": Shape(576, 1536, 9, 3, 30, vocabulary=49152),
    "tiny": Shape(192, 320, 4, 2, 4, vocabulary=300),
}


def write_model(folder: Path, shape: Shape, blocks: int, tokens: int, device: str) -> None:
    """A checkpoint of random weights, one file per block."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int) -> torch.Tensor:
        value = torch.randn(rows, columns, generator=generator, device=device)
        return value.mul_(columns**-0.5).to(torch.bfloat16).cpu()

    def gain() -> torch.Tensor:
        noise = torch.randn(shape.hidden, generator=generator, device=device)
        chance = torch.rand(shape.hidden, generator=generator, device=device)
        return torch.where(chance < OUTLIERS, 10.0, (0.3 * noise).exp()).to(torch.bfloat16).cpu()

    head_size = shape.hidden // shape.heads
    narrow = head_size * shape.key_value_heads
    parts: dict[str, dict[str, torch.Tensor]] = {
        "outside": {
            "model.embed_tokens.weight": normal(shape.vocabulary, shape.hidden),
            "model.norm.weight": gain(),
            "lm_head.weight": normal(shape.vocabulary, shape.hidden),
        }
    }
    places: dict[str, str] = {}
    for i in range(-1, blocks):
        name = "outside" if i < 0 else f"block-{i:05}"
        if i >= 0:
            prefix = f"model.layers.{i}"
            parts[name] = {
                f"{prefix}.input_layernorm.weight": gain(),
                f"{prefix}.post_attention_layernorm.weight": gain(),
                f"{prefix}.self_attn.q_proj.weight": normal(shape.hidden, shape.hidden),
                f"{prefix}.self_attn.k_proj.weight": normal(narrow, shape.hidden),
                f"{prefix}.self_attn.v_proj.weight": normal(narrow, shape.hidden),
                f"{prefix}.self_attn.o_proj.weight": normal(shape.hidden, shape.hidden),
                f"{prefix}.mlp.gate_proj.weight": normal(shape.intermediate, shape.hidden),
                f"{prefix}.mlp.up_proj.weight": normal(shape.intermediate, shape.hidden),
                f"{prefix}.mlp.down_proj.weight": normal(shape.hidden, shape.intermediate),
            }
        tensors = parts.pop(name)
        save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
        places |= {tensor: f"{name}.safetensors" for tensor in tensors}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config(blocks, tokens)))


def windows(shape: Shape, sequences: int, held_out: int, tokens: int) -> CalibrationSet:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, shape.vocabulary, (sequences + held_out, tokens), generator=generator)
    return CalibrationSet(ids[:sequences], ids[sequences:], f"random-{ids.shape}")


class Memory:
    """The largest anonymous host memory of this process, sampled, above what it began with."""

    def __init__(self) -> None:
        self._begin = self.peak = _anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(1 / MEMORY_SAMPLES_PER_SECOND):
            self.peak = max(self.peak, _anonymous_bytes())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return 1024 * (int(found["RssAnon"]) + int(found["RssShmem"]))


@dataclass(frozen=True)
class Unit:
    """Seconds of one unit of a stage, by what was done."""

    stage: str
    number: int
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Watch:
    """Turns a job's progress into units."""

    def __init__(self, recorder: Recorder, blocks: int) -> None:
        self._recorder, self._blocks = recorder, blocks
        self._passes = 0
        self.units: list[Unit] = []

    def __call__(self, event: Progress) -> None:
        if event.kind == "progress" and event.done is not None:
            done = event.done
            backward = event.stage == "profile" and event.total == 2 * self._blocks
            second = backward and done > self._blocks
            name = event.stage + (" backward" if second else " forward" if backward else "")
            if event.stage == "allocate":
                self._passes += done == 1
                name += f" pass {self._passes}"
            self._add(name, done - self._blocks if second else done)
        elif event.state in ("started", "finished", "skipped"):
            self._add(event.stage, 0 if event.state == "started" else -1)

    def _add(self, name: str, number: int) -> None:
        self.units.append(Unit(name, number, self._recorder.take()))

    def split(self, name: str) -> None:
        """What passed since the last unit is one of this name, and no part of a stage's block."""
        self._add(name, 0)


@contextmanager
def passes_of_weights(watch: Watch) -> Iterator[None]:
    """Refinement's passes over all blocks for weights of tokens and rows are units of their own."""

    def watched(*given: Any, **named: Any) -> LossWeights:
        watch.split("refine start")
        found = loss_weights(*given, **named)
        watch.split(WEIGHTS)
        return found

    with patch.object(refinement, "loss_weights", watched):
        yield


def run(options: argparse.Namespace, group: Ranks, device: torch.device) -> dict[str, Any]:
    shape = SHAPES[options.shape]
    spec = spec_of(options)
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        root = Path(group.broadcast(name))
        source = root / "source"
        if group.first:
            source.mkdir()
            write_model(source, shape, options.blocks, options.tokens, options.device)
        group.barrier()
        held = hold_rest(options.device_gib, device)
        with Memory() as memory, Recorder(device) as recorder, profiled(options):
            watch = Watch(recorder, options.blocks)
            with computing(), passes_of_weights(watch):
                planned = run_stages(spec, source, root, device, group, watch, options, shape)
        peak = memory.peak
        group.barrier()
    measured = {stage: seconds_of(stage, watch.units, options, shape) for stage in STAGES}
    if "gradient" in spec.method.needs:
        pass_of_weights(measured["refine"], watch.units, options, shape)
    forward = measured["profile"]["phases"].get("profile forward", 0.0)
    full = replace_blocks(planned, shape.blocks)
    again = runs_again(options, full, device) * shape.blocks * forward
    measured["profile"]["all_blocks"] = round(measured["profile"]["all_blocks"] + again, 2)
    machine = Machine(accelerator=device.type == "cuda", threads=torch.get_num_threads())
    return {
        "shape": options.shape,
        "blocks": options.blocks,
        "of_blocks": shape.blocks,
        "allocation": options.allocation,
        "check": options.check,
        "sequences": options.sequences,
        "held_out": options.held_out,
        "profile_sequences": options.profile_sequences,
        "tokens": options.tokens,
        "devices": group.size,
        "code_bits": options.bits,
        "refinement": spec.refinement.model_dump(mode="json", exclude={"omniquant"}),
        "stages": measured,
        "seconds_all_blocks": round(sum(part["all_blocks"] for part in measured.values()), 1),
        "device_gib": options.device_gib,
        "device_peak_bytes": device_peak(device) - held.numel(),
        "host_peak_bytes": peak,
        "estimated_for_these_blocks": estimate(planned, spec, machine).model_dump(mode="json"),
        "estimated_for_all_blocks": estimate(full, spec, machine).model_dump(mode="json"),
        "machine": machine_of(device),
        "units": [asdict(unit) for unit in watch.units],
    }


def hold_rest(gib: float | None, device: torch.device) -> torch.Tensor:
    """Takes a device's free memory, u8, but for so many GiB; none where all is left."""
    free = free_device_bytes(device)
    held = max(0, free - int(gib * (1 << 30))) if gib is not None else 0
    tensor = torch.empty(held, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return tensor


def device_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def runs_again(options: argparse.Namespace, plan: Plan, device: torch.device) -> float:
    """Share of all blocks that a backward pass runs forward twice, to keep fewer inputs."""
    element = 2 if device.type == "cuda" else 4
    size = options.profile_sequences * options.tokens * plan.hidden_size * element
    tokens = PassSettings.batch * options.tokens
    room = input_room(plan, free_device_bytes(device), element, tokens) - size
    if room < least_inputs(plan.block_count) * size:
        room = spare_host_bytes()
    return 1 - 1 / choose_every(plan.block_count, size, room)


STAGES = ("profile", "allocate", "refine", "pack")


def spec_of(options: argparse.Namespace) -> QuantizationConfig:
    refinement = {name: False for name in options.without}
    method = options.allocation
    bits = round(options.bits) if method in ("sba", "uniform") else options.bits
    return parse_config(
        {
            "code": options.code,
            "budget": {"code_bits": bits},
            "allocation": {"method": method, "check": options.check},
            "refinement": refinement,
            "devices": options.devices,
            "calibration": {
                "sequences": options.sequences,
                "length": options.tokens,
                "held_out": options.held_out,
                "profile_sequences": options.profile_sequences,
            },
        }
    )


def run_stages(
    spec: QuantizationConfig,
    source: Path,
    root: Path,
    device: torch.device,
    group: Ranks,
    watch: Watch,
    options: argparse.Namespace,
    shape: Shape,
) -> Plan:
    """The job's stages from profile to pack, on windows of random tokens."""
    job = Job(
        config=spec,
        model_folder=source,
        space=Workspace(root / "job", watch, lambda: False, group, device),
        output=root / "out",
        gguf=None,
        profiles=None,
    )
    resolved = job.resolve()
    planned = job.plan(resolved)
    tokens = windows(shape, options.sequences, options.held_out, options.tokens)
    profiled = job.profile(resolved, planned, tokens)
    bit_widths = job.allocate(resolved, planned, tokens, profiled).bit_widths
    refined = job.refine(resolved, planned, tokens, profiled, bit_widths)
    job.pack(resolved, planned, bit_widths, refined)
    return planned


def seconds_of(
    stage: str, units: list[Unit], options: argparse.Namespace, shape: Shape
) -> dict[str, Any]:
    """Measured seconds of a job's stage, and those of all blocks of the shape."""
    mine = [unit for unit in units if unit.stage.split()[0] == stage and unit.number]
    measured = sum(unit.total for unit in mine)
    missing = shape.blocks - options.blocks
    parts: dict[str, float] = {}
    phases: dict[str, float] = {}
    for phase in dict.fromkeys(unit.stage for unit in mine if unit.number > 0):
        steady = [unit.seconds for unit in mine if unit.stage == phase and unit.number > 0]
        if stage == "pack":
            linears = len(steady) // options.blocks
            steady = [added(steady[i : i + linears]) for i in range(0, len(steady), linears)]
        inner = slice(1, -1) if stage == "refine" else slice(1, None)
        steady = steady[inner] or [averaged(steady)]
        for name in {name for seconds in steady for name in seconds}:
            times = [seconds.get(name, 0.0) for seconds in steady]
            parts[name] = parts.get(name, 0.0) + statistics.median(times)
        phases[phase] = sum(parts.values()) - sum(phases.values())
    block = sum(parts.values())
    return {
        "measured": round(measured, 3),
        "block": round(block, 4),
        "all_blocks": round(measured + missing * block, 2),
        "phases": {phase: round(seconds, 4) for phase, seconds in phases.items()},
        "block_parts": {k: round(v, 4) for k, v in sorted(parts.items(), key=lambda kv: -kv[1])},
    }


def pass_of_weights(
    refine: dict[str, Any], units: list[Unit], options: argparse.Namespace, shape: Shape
) -> None:
    """Adds the passes over all blocks for weights of tokens and rows; all but the head's part of
    them grows with the blocks. What else refinement begins with, once, counts as it was."""
    parts = added([unit.seconds for unit in units if unit.stage == WEIGHTS])
    start = sum(unit.total for unit in units if unit.stage == "refine start")
    whole = sum(parts.values())
    grows = (whole - parts.get("head", 0.0)) * (shape.blocks - options.blocks) / options.blocks
    refine["weights_pass"] = round(whole, 3)
    refine["measured"] = round(refine["measured"] + start + whole, 3)
    refine["all_blocks"] = round(refine["all_blocks"] + start + whole + grows, 2)


def averaged(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: seconds / len(parts) for name, seconds in added(parts).items()}


def added(parts: list[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, seconds in part.items():
            total[name] = total.get(name, 0.0) + seconds
    return total


def replace_blocks(planned: Plan, blocks: int) -> Plan:
    """The plan of a model with this many blocks, each like the first."""
    linears = planned.block_linears(0)
    prefix = planned.block_prefix
    kept = [t for t in planned.tensors if t.module.startswith(f"{prefix}.0.")]
    outside = [t for t in planned.tensors if not t.module.startswith(f"{prefix}.")]

    def named(name: str, i: int) -> str:
        return name.replace(f"{prefix}.0.", f"{prefix}.{i}.")

    copied = planned.model_dump(mode="json") | {
        "block_count": blocks,
        "linears": [
            li.model_dump(mode="json") | {"name": named(li.name, i), "block": i}
            for i in range(blocks)
            for li in linears
        ],
        "tensors": [t.model_dump(mode="json") for t in outside]
        + [
            t.model_dump(mode="json") | {"name": named(t.name, i), "module": named(t.module, i)}
            for i in range(blocks)
            for t in kept
        ],
    }
    return Plan.model_validate(copied)


@contextmanager
def profiled(options: argparse.Namespace) -> Iterator[None]:
    """With --trace, torch's profiler over the run; its table goes to that file."""
    if options.trace is None:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        yield
    key = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=key, row_limit=45, max_name_column_width=70)
    options.trace.write_text(table)


def machine_of(device: torch.device) -> dict[str, Any]:
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a table of stages, with the parts of one block."""
    gib = 1 << 30
    held = f" with {result['device_gib']:g} GiB" if result["device_gib"] else ""
    lines = [
        f"## {result['shape']}, {result['allocation']}, {result['blocks']} of "
        f"{result['of_blocks']} blocks",
        f"{result['sequences']} + {result['held_out']} windows of {result['tokens']} tokens "
        f"({result['profile_sequences']} for the profile), {result['code_bits']} code bits, on "
        f"{result['devices']} x {result['machine']['device']}{held}, torch "
        f"{result['machine']['torch']}.",
        "",
        "| stage | measured, s | one block, s | all blocks, s | parts of one block, s |",
        "|---|---|---|---|---|",
    ]
    for name, part in result["stages"].items():
        parts = ", ".join(f"{k} {v:.3f}" for k, v in part["block_parts"].items() if v >= 0.0005)
        if "weights_pass" in part:
            parts += f"; before the first block, of all blocks {part['weights_pass']:.1f}"
        lines.append(
            f"| {name} | {part['measured']:.2f} | {part['block']:.3f} | {part['all_blocks']:.1f} "
            f"| {parts} |"
        )
    estimated = result["estimated_for_these_blocks"]
    whole = result["estimated_for_all_blocks"]
    lines += [
        f"| **together** | | | **{result['seconds_all_blocks']:.1f}** | |",
        "",
        f"Device memory: {result['device_peak_bytes'] / gib:.1f} GiB (estimate "
        f"{estimated['accelerator_bytes'] / gib:.1f}, all blocks "
        f"{whole['accelerator_bytes'] / gib:.1f}). Host memory: "
        f"{result['host_peak_bytes'] / gib:.1f} GiB (estimate "
        f"{estimated['host_bytes'] / gib:.1f}, all blocks {whole['host_bytes'] / gib:.1f}).",
    ]
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-7b")
    parser.add_argument("--blocks", type=int, default=4, help="decoder blocks that are run")
    parser.add_argument("--sequences", type=int, default=128, help="calibration windows")
    parser.add_argument("--held-out", type=int, default=16, help="windows that only judge")
    parser.add_argument("--profile-sequences", type=int, help="windows of the profile, all if left")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--allocation", choices=("knapsack", "sba", "uniform"), default="knapsack")
    parser.add_argument(
        "--check",
        choices=["off", "maps", "corrected"],
        default="maps",
        help="of the knapsack's map; parts of it grow with the blocks that are run",
    )
    parser.add_argument("--bits", type=float, default=3.0, help="code bits")
    parser.add_argument("--code", choices=("auto", "affine", "trellis"), default="auto")
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        choices=("clip_search", "compensated_grid", "scale_refit", "asymmetric"),
        help="parts of refinement that are switched off",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--devices", type=int, default=1, help="accelerators that work together")
    parser.add_argument("--device-gib", type=float, help="device memory to take, the rest is held")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder is made")
    parser.add_argument("--trace", type=Path, help="write torch's profiler table to this file")
    parser.add_argument("--out", type=Path, help="folder for the result as JSON and markdown")
    options = parser.parse_args(arguments)
    options.profile_sequences = options.profile_sequences or options.sequences
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.devices > 1 and not is_rank():
        run_ranks(options.devices, [__file__, *(arguments or sys.argv[1:])])
        return 0
    begin = time.perf_counter()
    with as_rank(options.device) as (group, device):
        result = run(options, group, device)
        if group.first:
            report(result, options.out, time.perf_counter() - begin)
    return 0


def report(result: Mapping[str, Any], out: Path | None, seconds: float) -> None:
    print(markdown(result))
    print(f"wall time with making the model: {seconds:.1f} s")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = f"quantize-speed-{result['shape']}-{result['allocation']}"
        name += f"-{result['devices']}" if result["devices"] > 1 else ""
        (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / f"{name}.md").write_text(markdown(result))


if __name__ == "__main__":
    raise SystemExit(main())
