"""What activations or cached keys and values of few bits cost, of a float model and quantized ones.

    python benchmarks/activations.py NAME=SOURCE ... --out benchmarks/results/activations

SOURCE is a Hugging Face folder. Rows are WEIGHTS/ROUNDED. Weights, all linears of the decoder
blocks, others are kept:

    float                        those of the source
    w8, w4                       rtn in groups of 128
    w8-smoothquant, -alpha       the same behind transform smoothquant, with alpha 0.5 or another
    w4-outliers                  the same with --outliers columns of every linear in 16 bits
    WEIGHTS-int8, WEIGHTS-fp8    what export w8a8 makes of them: each row of 8 bits
    smoothquant-package          llm-compressor's SmoothQuant and its W8A8, by `methods_peers.py`

Rounded, while the model runs: a baseline of `evaluation` (docs/methods.md), "none" for nothing.
Calibration windows are the first of the bundled calibration text (seed 0); evaluation windows the
first of both evaluation texts. Rows that OUT.json has are left out, refined blocks stay in WORK.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bitmill.calibration.windows import CalibrationSet, calibration_tokens, evaluation_tokens
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import QuantizationConfig, parse_config
from bitmill.config.rounded import rounded_baselines
from bitmill.evaluation.compare import Candidate, measure, with_weights
from bitmill.evaluation.count import Count
from bitmill.evaluation.logits import StreamedLogits
from bitmill.evaluation.rounded import NO_COLUMNS, rounding
from bitmill.formats.accounting import footprint
from bitmill.formats.codec import codec_of
from bitmill.formats.w8a8.format import W8A8
from bitmill.io.atomic import read_json, write_json
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import make_plan
from bitmill.quant.outliers import outlier_inputs
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.runtime.process import computing

TEXTS = ("wiki_evaluation", "handbook_evaluation")
PACKAGE = "smoothquant-package"
ROWS = (
    *("float/activations-8", "float/activations-8-absmax", "float/activations-8-llmint8"),
    *("float/activations-fp8", "float/activations-4", "float/activations-4-llmint8"),
    *("float/cache-8", "float/cache-4", "float/cache-2"),
    *("w8/none", "w8/activations-8-absmax", "w8/activations-8-llmint8", "w8/cache-4"),
    *("w8-smoothquant/none", "w8-smoothquant/activations-8-absmax"),
    *("w8-int8/activations-8-absmax", "w8-smoothquant-int8/activations-8-absmax"),
    *("w8-fp8/activations-fp8", "w8-smoothquant-fp8/activations-fp8"),
    f"{PACKAGE}/activations-8-absmax",
    *("w4/none", "w4/activations-8-absmax", "w4/activations-4", "w4/activations-4-llmint8"),
    *("w4-smoothquant/none", "w4-smoothquant/activations-8-absmax"),
    "w4-smoothquant/activations-4",
    *("w4-outliers/none", "w4-outliers/activations-4", "w4-outliers/activations-4-quik"),
    "w4-outliers/activations-8-quik",
)
Entry = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Weights:
    """f32 [N, K] by the name of a linear, norms that have changed, and what is known of them.

    outliers: columns of a linear's inputs whose weights are in 16 bits. spent: true bits, seconds.
    """

    linear: Callable[[str], Tensor]
    vectors: dict[str, Tensor]
    outliers: Callable[[str], Tensor]
    spent: Entry


def no_outliers(_: str) -> Tensor:
    """Of no linear."""
    return NO_COLUMNS


@dataclass(frozen=True)
class Bench:
    """One model; windows (count, length) of calibration and evaluation."""

    source: Path
    work: Path
    calibration: tuple[int, int]
    evaluation: tuple[int, int]
    outliers: int
    device: str
    python: str

    def config(self, transforms: list[Entry]) -> QuantizationConfig:
        """Of plain rounding behind transforms."""
        sequences, length = self.calibration
        refinement = {"method": "rtn", "transforms": transforms}
        calibration = {"sequences": sequences, "length": length, "held_out": 0}
        asked = {"budget": {"bits": 16}, "refinement": refinement, "calibration": calibration}
        return parse_config(asked)

    @cached_property
    def model(self) -> StreamedModel:
        """The float model."""
        plan = make_plan(self.source, self.config([]))
        where = torch.device(self.device)
        return StreamedModel(self.source, plan, device=where, dtype=torch.float32)

    @cached_property
    def tokens(self) -> CalibrationSet:
        """Calibration windows."""
        return calibration_tokens(self.config([]).calibration, self.source, seed=0)

    @cached_property
    def windows(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Evaluation windows of each text, and what the source's last block makes of them."""
        count, length = self.evaluation
        found = {}
        for name in TEXTS:
            own = evaluation_tokens(name, self.source, length=length, sequences=count)
            found[name] = own, StreamedLogits(self.model).last_block(own)
        return found

    def weights(self, name: str) -> Weights:
        """Made now, or by an earlier run."""
        if name == PACKAGE:
            return self._package()
        base, _, kind = name.rpartition("-")
        if kind in ("int8", "fp8"):
            before, codec = self.weights(base), codec_of(W8A8.model_validate({"dtype": kind}))
            return Weights(
                lambda linear: codec.kept(before.linear(linear)),
                before.vectors,
                before.outliers,
                {"bits": 8 + 32 / mean_columns(self.model)},
            )
        return self._rounded(name)

    def _rounded(self, name: str) -> Weights:
        model = self.model
        width, smooth = int(name[1]), re.search(r"smoothquant(?:-(.+))?$", name)
        alpha = float(smooth[1]) if smooth and smooth[1] else 0.5
        config = self.config([{"name": "smoothquant", "alpha": alpha}] if smooth else [])
        chosen = BitWidthMap.uniform(model.plan.shapes, width)
        if name.endswith("outliers"):
            counts = {shape.name: self.outliers for shape in model.plan.shapes}
            chosen = chosen.model_copy(update={"outliers": counts})
        folder = self.work / name
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        refine_model(
            model,
            RefineInputs(self.tokens, chosen, {}),
            config.method,
            folder,
            seed=0,
            on_unit=lambda *_: None,
            transforms=config.transforms,
        )
        seconds = round(time.perf_counter() - started, 1)
        refined = RefinedModel(folder, model.plan)
        spent = {"bits": footprint(model.plan, chosen).bits, "seconds": seconds}
        return Weights(
            lambda linear: refined.linear(linear).dequantize(),
            refined.changed,
            lambda linear: outlier_inputs(refined.linear(linear).rewrites),
            spent,
        )

    def _package(self) -> Weights:
        folder = self.work / PACKAGE
        if not (folder / "made.json").exists():
            script = Path(__file__).with_name("methods_peers.py")
            asked = ["llmcompressor-smoothquant", self.source, folder, "--bits", 8]
            asked += ["--calibration", *self.calibration, "--device", self.device]
            subprocess.run([self.python, script, *map(str, asked)], check=True)
        stored = safe_open(folder / "model.safetensors", framework="pt")
        plan = self.model.plan
        vectors = {
            tensor.module: stored.get_tensor(tensor.name)
            for tensor in plan.tensors
            if len(tensor.shape) == 1 and tensor.module.startswith(plan.block_prefix)
        }
        made = read_json(folder / "made.json")
        return Weights(lambda one: stored.get_tensor(f"{one}.weight"), vectors, no_outliers, made)

    def row(self, name: str) -> Entry:
        """Figures of both texts."""
        kind, _, rounded = name.partition("/")
        model, change = self.model, None
        found = None if kind == "float" else self.weights(kind)
        if rounded != "none":
            outliers = no_outliers if found is None else found.outliers
            change = rounding(rounded_baselines()[rounded], outliers=outliers)
        if found is None:
            logits = StreamedLogits(model, replace=change and partial(change, model))
        else:
            logits = with_weights(model, found.linear, found.vectors, change)
        candidate = Candidate(BitWidthMap.uniform(model.plan.shapes, 8), logits, model.plan)
        texts = {text: windows for text, (windows, _) in self.windows.items()}
        known = {text: outputs for text, (_, outputs) in self.windows.items()}
        whole, measured = measure(
            model, texts, {name: candidate}, Count(lambda *_: None, 0), known=known
        )
        entry = {} if found is None else dict(found.spent)
        entry["source"] = {t: q.model_dump(mode="json") for t, q in whole.texts.items()}
        entry["texts"] = {t: q.model_dump(mode="json") for t, q in measured.texts.items()}
        return entry


def mean_columns(model: StreamedModel) -> float:
    """Of all linears, by their weights: a row's scale is shared by so many."""
    shapes = model.plan.shapes
    return sum(shape.weights for shape in shapes) / sum(shape.rows for shape in shapes)


def place(row: str) -> tuple[int, str]:
    """Of a row in its table."""
    return (ROWS.index(row) if row in ROWS else len(ROWS)), row


def markdown(state: Entry) -> str:
    """The tables of a results file."""
    (calibrated, length), (count, evaluated) = state["calibration"], state["evaluation"]
    lines = [
        "# Activations and caches of few bits",
        f"Calibration {calibrated} windows of {length} tokens, evaluation the first {count} windows"
        f" of {evaluated} of each text, float32, {state['outliers']} columns in 16 bits in rows "
        f"`w4-outliers`. Command: `{state['command']}`. {state['machine']}, commit "
        f"{state['commit']}. Other work ran on the machine.",
    ]
    for model, rows in state["models"].items():
        some = next(iter(rows.values()))["source"]
        told = ", ".join(f"{t} {some[t]['perplexity']:.2f}" for t in TEXTS)
        lines += [
            "",
            f"## {model}: {told}",
            "| weights | rounded | true bits | wiki perplexity | KL | handbook perplexity | KL |",
            "|---" * 7 + "|",
        ]
        for name, entry in sorted(rows.items(), key=lambda row: place(row[0])):
            weights, _, rounded = name.partition("/")
            bits = f"{entry['bits']:.3f}" if "bits" in entry else ""
            figures = [
                f"{entry['texts'][t]['perplexity']:.2f} | {entry['texts'][t]['kl']:.4f} ± "
                f"{entry['texts'][t]['kl_se']:.4f}"
                for t in TEXTS
            ]
            lines.append(f"| {weights} | {rounded} | {bits} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="NAME=SOURCE")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of ROWS, or other rows")
    parser.add_argument("--calibration", type=int, nargs=2, default=(8, 512))
    parser.add_argument("--evaluation", type=int, nargs=2, default=(4, 512))
    parser.add_argument("--outliers", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--python", default=sys.executable, help="that has llm-compressor")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="", help="of the code, for the record")
    options = parser.parse_args()
    kept = options.out.with_suffix(".json")
    models: dict[str, Entry] = read_json(kept)["models"] if kept.exists() else {}
    asked = [row for one in options.rows for row in ([r for r in ROWS if fnmatch(r, one)] or [one])]
    for name, _, source in (one.partition("=") for one in options.sources):
        bench = Bench(
            Path(source),
            options.work / name,
            tuple(options.calibration),
            tuple(options.evaluation),
            options.outliers,
            options.device,
            options.python,
        )
        rows = models.setdefault(name, {})
        for row in asked:
            if row in rows:
                continue
            with computing(1):
                rows[row] = bench.row(row)
            figures = [rows[row]["texts"][text] for text in TEXTS]
            print(name, row, [(round(f["perplexity"], 3), round(f["kl"], 4)) for f in figures])
            state = {
                "command": " ".join(["python", *sys.argv]),
                "commit": options.commit,
                "calibration": options.calibration,
                "evaluation": options.evaluation,
                "outliers": options.outliers,
                "machine": f"{platform.machine()}, torch {version('torch')}, transformers "
                f"{version('transformers')}, Python {platform.python_version()}",
                "models": models,
            }
            write_json(kept, state)
            options.out.with_suffix(".md").write_text(markdown(state))


if __name__ == "__main__":
    main()
