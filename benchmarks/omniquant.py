"""Block-wise learning and scale tuning, end to end on a real model: perplexity of each variant.

    python benchmarks/omniquant.py --model FOLDER --work DIR --out results.json \\
        --jobs 4 "2: bits=2" "2-plain: bits=2 block_error=plain" "lwc: bits=3 mode=clipping ..."

A row is a name and settings; unknown ones are errors. Besides the fields of `LearningSettings`:

    bits        code bits of the budget           start       gptq | rtn
    allocation  knapsack | uniform                order       activation | natural
    asymmetric  GPTQ's correction for the prefix, 1 or 0
    fuse_siblings  q/k/v and gate/up of a block share one map, 1 or 0
    learn       1, or 0 to stop at the start
    scales      steps of end-to-end tuning, which starts from the learned weights
    tune_batch, tune_rate: its settings

Rows run as processes of their own, `--jobs` at a time on one device; a row that fails or outlasts
`--limit` is reported as such. Protocol: 64 calibration and 16 held-out windows of 2048 tokens of
the bundled text, perplexity and KL on all windows of both evaluation texts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import transformers

from bitmill.allocation.allocator import allocate
from bitmill.allocation.profile import SensitivityProfile
from bitmill.calibration.hooks import run_windows
from bitmill.calibration.statistics import Stream
from bitmill.calibration.windows import calibration_tokens, evaluation_tokens
from bitmill.config.methods import GPTQ, RTN
from bitmill.config.quantization import QuantizationConfig, parse_config
from bitmill.evaluation.logits import perplexity_and_kl
from bitmill.models.convert_gguf import convert_gguf
from bitmill.models.streamed import StreamedModel, set_weight, weight_of
from bitmill.plan.model_plan import make_plan
from bitmill.quant.tensors import Quantized, affine
from bitmill.refinement.block import RefineSettings, refine_block
from bitmill.refinement.omniquant.block import BlockData, learn_block
from bitmill.refinement.omniquant.end_to_end import TuneSettings, tune_scales
from bitmill.refinement.omniquant.metric import fisher_metric, gradient_moments
from bitmill.refinement.omniquant.settings import LearningSettings
from bitmill.sensitivity.fisher import SensitivitySettings, profile_knapsack
from bitmill.solvers.solver import solver_of
from bitmill.transforms.column_order import ColumnOrders

TEXTS = ("wiki_evaluation", "handbook_evaluation")
LEARNING = {field.name for field in dataclasses.fields(LearningSettings)}


@dataclasses.dataclass
class Row:
    """One variant."""

    name: str
    bits: float = 3.0
    allocation: str = "knapsack"
    order: Literal["natural", "activation"] = "activation"
    start: str = "gptq"
    asymmetric: int = 1
    fuse_siblings: int = 0
    learn: int = 1
    scales: int = 0
    tune_batch: int = TuneSettings.batch
    tune_rate: float = TuneSettings.scale_rate
    learning: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Row:
        """From "name: key=value key=value"."""
        name, _, settings = text.partition(":")
        row = cls(name.strip())
        for pair in settings.split():
            key, _, raw = pair.partition("=")
            value = parse_value(raw)
            if key in LEARNING:
                row.learning[key] = value
            elif key in {f.name for f in dataclasses.fields(cls)} - {"name", "learning"}:
                setattr(row, key, value)
            else:
                raise SystemExit(f"row {name}: unknown setting {key!r}")
        return row

    def spec(self, args: argparse.Namespace) -> QuantizationConfig:
        """The job whose budget and map this row uses."""
        widths = [1, 2, 3, 4, 5, 6]
        allocation = {
            "method": self.allocation,
            "order": self.order,
            "widths": widths,
            "fuse_siblings": bool(self.fuse_siblings),
        }
        calibration = {"sequences": args.sequences, "length": args.length, "held_out": args.held}
        return parse_config(
            {
                "budget": {"code_bits": self.bits},
                "allocation": allocation,
                "calibration": calibration,
            }
        )

    def settings(self) -> LearningSettings:
        """Mode defaults with this row's changes."""
        settings = LearningSettings.of_mode(self.learning.get("mode", "rounding"))
        return dataclasses.replace(settings, **self.learning)


def parse_value(text: str) -> Any:
    """JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


class Bench:
    """What all rows share: the model, its tokens, the profile and the gradient moments."""

    def __init__(self, args: argparse.Namespace, spec: QuantizationConfig) -> None:
        self.args, self.work, self.folder = args, Path(args.work), Path(args.model)
        self.device = torch.device(args.device)
        self.plan = make_plan(self.folder, spec)
        self.model = StreamedModel(self.folder, self.plan, device=self.device, dtype=torch.float32)
        self.calibration = calibration_tokens(spec.calibration, self.folder)
        self.references = {text: DeviceLogits(self.model) for text in TEXTS}

    def profile(self, order: Literal["natural", "activation"]) -> SensitivityProfile:
        """The sensitivity profile of one order, measured once and kept in the work folder."""
        path = self.work / f"profile-{order}.npz"
        if path.exists():
            return SensitivityProfile.load(path)
        settings = SensitivitySettings(widths=(1, 2, 3, 4, 5, 6), order=order)
        profile = profile_knapsack(self.model, self.calibration.tokens, self.plan, settings)
        profile.save(path)
        return profile

    def evaluation(self, text: str) -> torch.Tensor:
        """Windows of an evaluation text."""
        return evaluation_tokens(
            text, self.folder, length=self.args.length, sequences=self.args.windows
        )

    def moments(self) -> list[torch.Tensor]:
        """Gradient moments at every block's output, measured once."""
        path = self.work / "moments.pt"
        if not path.exists():
            tokens = self.calibration.tokens[: self.args.moment_sequences]
            torch.save(gradient_moments(self.model, tokens, seed=0), path)
        moments: list[torch.Tensor] = torch.load(path, weights_only=True)
        return moments


def prepare(args: argparse.Namespace, rows: list[Row]) -> None:
    """Measure what rows share, before they start side by side."""
    Path(args.work).mkdir(parents=True, exist_ok=True)
    if args.gguf:
        target = Path(args.work) / "model"
        if not target.exists():
            convert_gguf(Path(args.gguf), target)
        args.model = str(target)
    began = time.perf_counter()
    bench = Bench(args, rows[0].spec(args))
    if any(row.learn and row.settings().block_error == "fisher" for row in rows):
        bench.moments()
    print(f"moments {time.perf_counter() - began:.1f}s", flush=True)
    needed = [r for r in rows if r.allocation == "knapsack" or r.order == "activation"]
    for order in sorted({row.order for row in needed}):
        bench.profile(order)
        print(f"profile {order} {time.perf_counter() - began:.1f}s", flush=True)


def run_row(args: argparse.Namespace, row: Row) -> dict[str, Any]:
    """Quantize, learn, tune and evaluate one row."""
    spec = row.spec(args)
    bench = Bench(args, spec)
    need = row.allocation == "knapsack" or row.order == "activation"
    profile = bench.profile(row.order) if need else None
    widths = dict(allocate(bench.plan, spec, profile).linears)
    began = time.perf_counter()
    weights, reports = quantize(bench, row, widths, profile)
    result: dict[str, Any] = {"seconds": time.perf_counter() - began, "blocks": reports}
    result["learned"] = evaluate(bench, weights)
    print(row.name, "before tuning", json.dumps(result["learned"]), flush=True)
    if row.scales:
        settings = TuneSettings(steps=row.scales, batch=row.tune_batch, scale_rate=row.tune_rate)
        tokens, held_out = bench.calibration.tokens, bench.calibration.held_out
        tuned = tune_scales(bench.model, weights, tokens, held_out, settings, seed=0)
        tuning = tuned.report.model_dump(mode="json")
        result["scales"] = evaluate(bench, tuned.weights) | {"tuning": tuning}
        print(row.name, "scales", json.dumps(result["scales"]), flush=True)
    return result


def quantize(
    bench: Bench, row: Row, widths: dict[str, tuple[int, ...]], profile: Any
) -> tuple[dict[str, Quantized], list[Any]]:
    """GPTQ (or rounding) and learning, block by block."""
    model, calibration, settings = bench.model, bench.calibration, row.settings()
    tokens = torch.cat([calibration.tokens, calibration.held_out])
    count = len(calibration.tokens)
    hidden = torch.cat([model.embed(t) for t in tokens.split(8)])
    source = hidden.clone()
    fisher = row.learn and settings.block_error == "fisher"
    moments = bench.moments() if fisher else []
    weights: dict[str, Quantized] = {}
    reports = []
    orders = {}
    if row.order == "activation":
        for linear in profile.linears:
            if linear.order is not None:
                orders[linear.name] = torch.from_numpy(profile.orders[linear.order]).long()
    method = GPTQ(asymmetric=bool(row.asymmetric)) if row.start == "gptq" else RTN()
    asymmetric = "shift" in method.needs
    transforms = (ColumnOrders(orders),)
    refine = RefineSettings(solver_of(method), method.needs, transforms, batch=8)
    for index in range(model.block_count):
        began = time.perf_counter()
        block = model.load_block(index)
        before = source
        source = run_windows(model, index, block, source, batch=8)
        float_weights = {n: weight_of(m).clone() for n, m in model.linears(block, index).items()}
        chosen = {name: tuple(widths[name]) for name in float_weights}
        starts, _ = refine_block(
            model,
            index,
            block,
            Stream(hidden[:count], before[:count] if asymmetric else None),
            chosen,
            refine,
            held_out=Stream(hidden[count:], before[count:]) if asymmetric else None,
        )
        weights |= starts
        refined = time.perf_counter()
        line = f"{row.name} block {index}: start {refined - began:.1f}s"
        if row.learn:
            data = BlockData(hidden[:count], source[:count], hidden[count:], source[count:])
            metric = None
            if fisher:
                metric = fisher_metric(moments[index].to(bench.device), settings.shrink)
            learned = learn_block(
                model, index, block, affine(starts), data, settings, seed=0, metric=metric
            )
            report = learned.report
            reports.append(report.model_dump(mode="json"))
            line += (
                f", learned {report.loss_before:.4g} -> {report.loss_after:.4g} at "
                f"{report.best_step}/{report.steps} in {report.seconds:.1f}s"
            )
            weights |= learned.weights
        print(line, flush=True)
        hidden = run_windows(model, index, block, hidden, batch=8)
    return weights, reports


def evaluate(bench: Bench, weights: Mapping[str, Quantized]) -> dict[str, Any]:
    """Perplexity and KL on both texts."""

    def replace(index: int, block: torch.nn.Module) -> None:
        for name, module in bench.model.linears(block, index).items():
            if name in weights:
                set_weight(module, weights[name].dequantize())

    result = {}
    for text in TEXTS:
        tokens = bench.evaluation(text)
        candidate = DeviceLogits(bench.model, replace)
        measures = perplexity_and_kl(bench.references[text], candidate, tokens, chunk=1024)
        quality = measures.candidate()
        result[text] = {"perplexity": quality.perplexity, "kl": quality.kl}
    return result


class DeviceLogits:
    """A `LogitSource` that keeps all hidden states on the device and runs eight windows at once."""

    def __init__(self, model: StreamedModel, replace: Any = None) -> None:
        self.model, self.replace = model, replace
        self.hidden: torch.Tensor | None = None

    @torch.no_grad()
    def windows(self, tokens: torch.Tensor) -> Any:
        """Logits of each window's positions; the hidden states are made once."""
        if self.hidden is None:
            hidden = torch.cat([self.model.embed(t) for t in tokens.split(8)])
            for index in range(self.model.block_count):
                block = self.model.load_block(index)
                if self.replace:
                    self.replace(index, block)
                hidden = run_windows(self.model, index, block, hidden, batch=8)
            self.hidden = hidden
        for row in self.hidden.split(1):
            yield lambda begin, end, row=row: self.model.logits(row[:, begin:end])[0]


def run_all(args: argparse.Namespace, rows: list[Row]) -> dict[str, Any]:
    """Every row in a process of its own, `jobs` at a time, until the time limit."""
    deadline = time.monotonic() + args.limit
    waiting = list(zip(rows, args.rows, strict=True))
    running: dict[str, tuple[subprocess.Popen[bytes], Path, int]] = {}
    results: dict[str, Any] = {}
    common = [a for a in sys.argv[1:] if a not in args.rows]
    while waiting or running:
        while waiting and len(running) < args.jobs:
            row, text = waiting.pop(0)
            taken = [gpu for _, _, gpu in running.values()]
            gpu = min(range(args.gpus), key=taken.count)
            out = Path(args.work) / f"row-{row.name}.json"
            out.unlink(missing_ok=True)
            command = [sys.executable, __file__, *common, "--single", str(out), text]
            if args.gguf:
                command += ["--model", args.model]
            threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
            environment = os.environ | {"OMP_NUM_THREADS": threads}
            if args.gpus > 1:
                environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
            running[row.name] = (subprocess.Popen(command, env=environment), out, gpu)
        for name, (process, out, _) in list(running.items()):
            if time.monotonic() > deadline and process.poll() is None:
                process.kill()
            if process.poll() is not None:
                done = json.loads(out.read_text()) if out.exists() else {"failed": process.wait()}
                results[name] = done
                del running[name]
                Path(args.out).write_text(json.dumps(document(results), indent=1))
        if time.monotonic() > deadline:
            waiting.clear()
        time.sleep(0.5)
    return results


def document(results: dict[str, Any]) -> dict[str, Any]:
    """Results with where they were made."""
    return {"device": device_name(), "torch": torch.__version__, "rows": results}


def device_name() -> str:
    """The accelerator, or the processor where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def table(results: dict[str, Any]) -> str:
    """A Markdown table of all rows."""
    lines = ["| row | after | wiki perplexity | KL | handbook perplexity | KL | s |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, result in results.items():
        if "learned" not in result:
            lines.append(f"| {name} | failed: {result.get('failed')} | | | | | |")
            continue
        for stage in ("learned", "scales"):
            if stage not in result:
                continue
            seconds = result[stage].get("tuning", result)["seconds"]
            cells = [
                f"{result[stage][text][k]:.4g}" for text in TEXTS for k in ("perplexity", "kl")
            ]
            lines.append(f"| {name} | {stage} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--model", default="", help="Hugging Face folder")
    parser.add_argument("--gguf", default="", help="GGUF file to convert first")
    parser.add_argument("--work", required=True)
    parser.add_argument("--out", default="omniquant.json")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1, help="rows are spread over so many GPUs")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds for all rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--held", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=None, help="evaluation windows per text")
    parser.add_argument("--moment-sequences", type=int, default=16)
    parser.add_argument("--single", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows = [Row.parse(text) for text in args.rows]
    if args.single:
        Path(args.single).write_text(json.dumps(run_row(args, rows[0])))
        return
    prepare(args, rows)
    results = run_all(args, rows)
    Path(args.out).write_text(json.dumps(document(results), indent=1))
    print(table(results))
    if any("learned" not in result for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
