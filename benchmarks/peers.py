"""Bitmill beside other quantizers at equal true bits on a real model.

    python benchmarks/peers.py measure SOURCE --model NAME --out OUT PEER ...
    python benchmarks/peers.py table JOBS --out OUT

PEER is autoround-BITS (the package auto-round: groups of 128, asymmetric, its own defaults) or
exl3-BITS (exllamav3, see `peers_exl3.py`), SOURCE a Hugging Face folder. Every peer gets the
calibration windows of `jobs.py`, quantizes all linears of the decoder blocks, and is measured on
the same evaluation windows by the same code; its true bits count all metadata. What was measured
stays in OUT.json with the package's version and the digests of source and windows, and is measured
again only where one of them changed.

`table` sets the rows of JOBS, a file of `jobs.py` or several of them by model, beside those of the
same model, whose excess is interpolated to the row's true bits, ln(excess) being linear in bits:

    excess = ln(perplexity / perplexity of the source), mean of both texts
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from jobs import row_of_texts
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitmill.calibration.windows import calibration_tokens, evaluation_windows
from bitmill.config.bit_width_map import GROUP_SIZE, BitWidthMap
from bitmill.config.quantization import Budget, Calibration, Evaluation, QuantizationConfig
from bitmill.evaluation.compare import Candidate, measure, with_weights
from bitmill.evaluation.count import Count
from bitmill.io.atomic import write_bytes, write_json
from bitmill.models.dtypes import compute_dtype
from bitmill.models.streamed import StreamedModel
from bitmill.models.tokenizer import load_tokenizer
from bitmill.plan.model_plan import Plan, make_plan
from bitmill.runtime.process import computing

PACKAGES = {"autoround": "auto-round", "exl3": "exllamav3"}
BATCH = 8
FURTHEST = 0.1
"""Bits past the last row of a peer up to which its line is drawn on."""


@dataclass(frozen=True)
class Made:
    """Dequantized weights f32 [N, K] by name, bits a weight that are stored and that are codes."""

    weights: Mapping[str, Tensor]
    bits: float
    code_bits: float


def autoround(
    source: Path, plan: Plan, tokens: Tensor, width: int, device: torch.device, iterations: int
) -> Made:
    """AutoRound on windows i64 [S, T], in bfloat16 as its users load models."""
    from auto_round import AutoRound
    from torch.utils.data import DataLoader

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    windows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    quantizer = AutoRound(
        model,
        load_tokenizer(source),
        bits=width,
        group_size=GROUP_SIZE,
        sym=False,
        iters=iterations,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        batch_size=min(BATCH, len(tokens)),
        dataset=DataLoader(windows, batch_size=min(BATCH, len(tokens))),
        device_map=str(device),
    )
    quantized, _ = quantizer.quantize()
    weights = {shape.name: _weight(quantized, shape.name) for shape in plan.shapes}
    for shape in plan.shapes:
        check_widths(weights[shape.name], width, shape.name)
    groups = sum(shape.rows * shape.groups for shape in plan.shapes)
    count = sum(shape.weights for shape in plan.shapes)
    return Made(weights, width + groups * (16 + width) / count, float(width))


def _weight(model: nn.Module, name: str) -> Tensor:
    linear: Any = model.get_submodule(name)
    weight: Tensor = linear.weight.detach().float().cpu()
    return weight


def check_widths(weight: Tensor, width: int, name: str) -> None:
    """Exit where a row's first group has more values than codes, so was not quantized."""
    values = len(weight[0, :GROUP_SIZE].unique())
    if values > 1 << width:
        raise SystemExit(f"{name} has {values} values in a group of {width} bits")


def exl3(
    source: Path, plan: Plan, tokens: Tensor, bits: float, device: torch.device, build: Path
) -> Made:
    """EXL3 on windows i64 [S, T]."""
    import peers_exl3

    model = StreamedModel(source, plan, device=device, dtype=torch.float32)
    made = peers_exl3.quantize(model, tokens, bits, build)
    return Made(made.weights, made.bits, made.code_bits)


@dataclass(frozen=True)
class Bench:
    """A source and the windows on it."""

    source: Path
    plan: Plan
    device: torch.device
    tokens: Tensor
    windows: Mapping[str, Tensor]
    digests: Mapping[str, str]

    @classmethod
    def of(cls, options: argparse.Namespace) -> Bench:
        """The windows that a job has by default, or as many as are asked for."""
        source: Path = options.source
        plan = make_plan(source, QuantizationConfig(budget=Budget(bits=16)))
        calibration, evaluation = Calibration(), Evaluation()
        if options.windows:
            count, length = options.windows
            calibration = Calibration(sequences=count, length=length, held_out=0)
            evaluation = Evaluation(sequences=count, length=length)
        tokens = calibration_tokens(calibration, source, rows=plan.vocab_size).tokens
        windows = evaluation_windows(evaluation, source, rows=plan.vocab_size)
        with (source / "model.safetensors").open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
        read = hashlib.sha256()
        for part in (tokens, *windows.values()):
            read.update(str(tuple(part.shape)).encode() + part.contiguous().numpy().tobytes())
        digests = {"source": weights, "windows": read.hexdigest()}
        return cls(source, plan, torch.device(options.device), tokens, windows, digests)

    def measured(self, made: Made) -> dict[str, Any]:
        """What `jobs.py` has of a report too."""
        dtype = compute_dtype(self.device, self.plan)
        model = StreamedModel(self.source, self.plan, device=self.device, dtype=dtype)
        candidate = Candidate(
            BitWidthMap.uniform(self.plan.shapes, 8),
            with_weights(model, lambda name: made.weights[name]),
            self.plan,
        )
        source, ours = measure(model, self.windows, {"peer": candidate}, Count(lambda *_: None, 0))
        return row_of_texts(source, ours)


def work(bench: Bench, peer: str, options: argparse.Namespace) -> dict[str, Any]:
    """One peer's row."""
    kind, _, bits = peer.partition("-")
    begin = time.perf_counter()
    where = (bench.source, bench.plan, bench.tokens)
    if kind == "autoround":
        made = autoround(*where, int(bits), bench.device, options.iterations)
    else:
        made = exl3(*where, float(bits), bench.device, options.build)
    seconds = time.perf_counter() - begin
    found = {"bits": made.bits, "code_bits": made.code_bits, "seconds": seconds}
    return found | bench.measured(made)


def measure_peers(options: argparse.Namespace) -> None:
    """Add what is missing of the peers asked for to the stored rows."""
    stored = options.out.with_suffix(".json")
    found = json.loads(stored.read_text()) if stored.exists() else {}
    stored.parent.mkdir(parents=True, exist_ok=True)
    rows = found.setdefault(options.model, {})
    with computing():
        bench = Bench.of(options)
        for peer in options.peers:
            package = PACKAGES[peer.partition("-")[0]]
            made_of = {package: version(package), **bench.digests}
            if package == PACKAGES["autoround"]:
                made_of["iterations"] = str(options.iterations)
            if peer in rows and rows[peer]["made_of"] == made_of:
                continue
            row = work(bench, peer, options)
            machine = {
                "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
            rows[peer] = row | {"made_of": made_of, "machine": machine}
            write_json(stored, found)
            print(
                f"{peer}: {row['bits']:.3f} bits, mean excess {row['mean_excess']:.4f}", flush=True
            )


def at_bits(points: list[tuple[float, float]], bits: float) -> float | None:
    """Excess at so many bits, ln(excess) being linear between neighbours; None too far outside.

    points: bits and excess, of two different numbers of bits at least.
    """
    points = sorted(points)
    if not points[0][0] - FURTHEST <= bits <= points[-1][0] + FURTHEST:
        return None
    right = next((i for i, (x, _) in enumerate(points[1:], 1) if bits <= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    share = (bits - x0) / (x1 - x0)
    return math.exp((1 - share) * math.log(y0) + share * math.log(y1))


def ratios(row: Mapping[str, Any], peers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """By kind of peer, the row's mean excess over the peer's at the same true bits."""
    found = {}
    for kind in PACKAGES:
        points = [
            (peer["bits"], peer["mean_excess"])
            for name, peer in peers.items()
            if name.startswith(f"{kind}-") and peer["mean_excess"] > 0
        ]
        other = at_bits(points, row["bits"]) if len(points) > 1 else None
        found[kind] = f"{row['mean_excess'] / other:.2f}" if other else ""
    return found


def table(jobs: Mapping[str, Any], peers: Mapping[str, Any]) -> str:
    """Markdown: a section for each model, by true bits."""
    lines = []
    for model, rows in peers.items():
        ours: Mapping[str, Any] = jobs.get(model, {})
        texts = list(next(iter(rows.values()))["excess"])
        short = [text.removesuffix("_evaluation") for text in texts]
        head = ["true bits", "what", *(f"ppl {text}" for text in short)]
        head += [*(f"excess {text}" for text in short), "mean excess"]
        head += [f"over {kind}" for kind in PACKAGES] + ["s"]
        lines += [f"## {model}", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        every = [*rows.items(), *ours.items()]
        for name, row in sorted(every, key=lambda pair: (pair[1]["bits"], pair[0])):
            cells = [f"{row['bits']:.3f}", name]
            cells += [f"{row['perplexity'][text]:.2f}" for text in texts]
            cells += [f"{row['excess'][text]:.4f}" for text in texts]
            cells += [f"{row['mean_excess']:.4f}"]
            cells += (ratios(row, rows) if name in ours else dict.fromkeys(PACKAGES, "")).values()
            lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("measure")
    asked.add_argument("source", type=Path)
    asked.add_argument("peers", nargs="+", metavar="PEER")
    asked.add_argument("--model", required=True, help="name of the model in OUT.json")
    asked.add_argument("--device", default="cpu")
    asked.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    asked.add_argument("--build", type=Path, default=Path("exl3-build"), help="of EXL3's kernels")
    asked.add_argument("--windows", type=int, nargs=2, metavar=("COUNT", "LENGTH"))
    shown = commands.add_parser("table")
    shown.add_argument("jobs", type=Path)
    for command in (asked, shown):
        command.add_argument("--out", type=Path, required=True, help="without suffix")
    options = parser.parse_args()
    if options.command == "measure":
        measure_peers(options)
        return
    peers = json.loads(options.out.with_suffix(".json").read_text())
    made = table(json.loads(options.jobs.read_text())["rows"], peers)
    write_bytes(options.out.with_suffix(".md"), made.encode())
    print(made)


if __name__ == "__main__":
    main()
