"""One real model at equal true bits: tokens alike or weighted, and tuned end to end.

    python benchmarks/trellis_learning.py measure SOURCE --model NAME --bits BITS --out ROW.json
    python benchmarks/trellis_learning.py table ROW.json ... --out OUT

`measure` profiles SOURCE (a Hugging Face folder), allocates BITS (--allocation) and makes, with
windows as by default, each of --variants: `plain` (method gptq, every token counts alike),
`squares` (tokens and rows weighted by the squared loss gradient), `roots` (by the roots of these
weights), `tokens` (by roots, but rows alike, as all variants before run 10),
`uncorrected` (`roots` without the correction for the quantized prefix), `bare` (neither) and
`tuned` (what --base gave, tuned for each number of --steps at each of --rates); the last three of
trellis codes alone. Jobs take roots for trellis codes and tokens alike for affine ones (--code).
In rows made while jobs took squares, those are called `weighted`. Each is measured on both
evaluation texts and on the held-out windows. --keep names a folder for profile and codes of one
model, code, calibration and allocation: commands that follow there take them over. Seconds are
those of the process; several may share a device. `table` sets rows of several commands beside
EXL3's of `peers.json`, interpolated to their bits, ln(excess) linear in bits:

    excess = ln(perplexity / perplexity of the source), per text and their mean
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from jobs import row_of_texts
from peers import at_bits
from torch import Tensor

from bitmill.allocation.allocator import allocate
from bitmill.calibration.loss_weights import POWER, LossWeights, loss_weights
from bitmill.calibration.windows import calibration_tokens, evaluation_windows
from bitmill.config.methods import GPTQ, MethodConfig, Statistic, TrellisGPTQ, TrellisOmniQuant
from bitmill.config.quantization import parse_config
from bitmill.evaluation.compare import Candidate, measure, with_weights
from bitmill.evaluation.count import Count
from bitmill.io.atomic import write_bytes, write_json
from bitmill.models.dtypes import compute_dtype
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import make_plan
from bitmill.quant.tensors import Quantized
from bitmill.refinement.model import WEIGHTS_NAME, RefinedModel, RefineInputs, refine_model
from bitmill.refinement.omniquant.end_to_end import tune_scales
from bitmill.refinement.omniquant.model import TRELLIS_RATE, tune_settings
from bitmill.runtime.process import computing
from bitmill.sensitivity.fisher import SensitivitySettings, profile_knapsack

HELD_OUT = "held_out"
PEERS = Path(__file__).with_name("results") / "peers.json"


class Unweighted(TrellisGPTQ):
    """Every token counts alike."""

    @property
    def needs(self) -> frozenset[Statistic]:
        return super().needs - {"gradient"}


class Weighted(GPTQ):
    """Affine codes, tokens weighted by the loss gradient."""

    @property
    def needs(self) -> frozenset[Statistic]:
        return super().needs | {"gradient"}


METHODS: dict[str, dict[str, MethodConfig]] = {
    "trellis": {
        "plain": Unweighted(),
        "squares": TrellisGPTQ(),
        "roots": TrellisGPTQ(),
        "tokens": TrellisGPTQ(),
        "uncorrected": TrellisGPTQ(asymmetric=False),
        "bare": Unweighted(asymmetric=False),
    },
    "affine": {"plain": GPTQ(), "squares": Weighted(), "roots": Weighted()},
}

POWERS = {"squares": 2.0, "tokens": POWER}
"""Of gradients, where the weights are not those of jobs."""


def measured(options: argparse.Namespace) -> None:
    """The rows of one budget, written as they come."""
    with ExitStack() as stack:
        keep = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _measured(options, keep)


def _measured(options: argparse.Namespace, folder: Path) -> None:
    config = parse_config(
        {
            "budget": {"bits": options.bits},
            "code": options.code,
            "calibration": options.calibration,
            "allocation": {"method": options.allocation},
        }
    )
    device, source = torch.device(options.device), options.source
    plan = make_plan(source, config)
    tokens = calibration_tokens(config.calibration, source, rows=plan.vocab_size)
    windows = evaluation_windows(config.evaluation, source, rows=plan.vocab_size)
    model = StreamedModel(source, plan, device=device, dtype=compute_dtype(device, plan))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    row: dict[str, Any] = {
        "model": options.model,
        "code": options.code,
        "bits": options.bits,
        "run": options.run,
        "machine": {
            "device": name,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "calibration": options.calibration,
        "allocation": options.allocation,
        "seconds": {},
        "variants": {},
    }
    clock = [time.perf_counter()]

    def spent(part: str) -> None:
        clock.append(time.perf_counter())
        row["seconds"][part] = round(clock[-1] - clock[-2], 1)
        write_json(options.out, row)
        print(options.model, options.code, options.bits, part, row["seconds"][part], flush=True)

    sensitivity = SensitivitySettings(widths=config.allocation.widths, code=options.code)
    profile = profile_knapsack(model, tokens.tokens, plan, sensitivity, folder=folder / "profile")
    bit_widths = allocate(plan, config, profile)
    row["predicted_loss"] = profile.predicted(bit_widths)
    orders = {
        linear.name: torch.tensor(profile.orders[linear.order]).long()
        for linear in profile.linears
        if linear.order is not None
    }
    spent("profile")

    def quality(weights: Mapping[str, Quantized], vectors: Mapping[str, Tensor]) -> dict[str, Any]:
        logits = with_weights(model, lambda name: weights[name].dequantize(), vectors)
        candidate = Candidate(bit_widths, logits, plan)
        first, ours = measure(model, windows, {"made": candidate}, Count(lambda *_: None, 0))
        held_out = {HELD_OUT: tokens.held_out}
        _, there = measure(model, held_out, {"made": candidate}, Count(lambda *_: None, 0))
        found = there.texts[HELD_OUT]
        return {
            "true_bits": ours.bits,
            **row_of_texts(first, ours),
            "held_out_kl": found.kl,
            "held_out_kl_se": found.kl_se,
        }

    def refined(what: str) -> dict[str, Quantized]:
        place = folder / f"{options.bits:g}" / what
        place.mkdir(parents=True, exist_ok=True)
        weights = place / WEIGHTS_NAME
        if what in POWERS and not weights.is_file():
            every = torch.cat([tokens.tokens, tokens.held_out])
            found = loss_weights(model, every, power=POWERS[what])
            if what == "tokens":
                found = LossWeights(found.tokens, {})
            write_bytes(weights, safetensors.torch.save(found.tensors()))
        refine_model(
            model,
            RefineInputs(tokens, bit_widths, orders),
            METHODS[options.code][what],
            place,
            seed=config.seed,
            on_unit=lambda *_: None,
            transforms=config.transforms,
        )
        made = RefinedModel(place, plan)
        return {name: made.linear(name) for name in bit_widths.linears}

    def keep(what: str, weights: Mapping[str, Quantized], vectors: Mapping[str, Tensor]) -> None:
        spent(what)
        row["variants"][what] = quality(weights, vectors)
        spent("evaluate")
        print(
            options.model,
            options.code,
            options.bits,
            what,
            row["variants"][what]["mean_excess"],
            flush=True,
        )

    made = {}
    for what in options.variants:
        if what != "tuned":
            made[what] = refined(what)
            keep(what, made[what], {})
    if "tuned" not in options.variants:
        return
    row["tuning"] = {}
    weights = made.get(options.base) or refined(options.base)
    for steps, rate in product(options.steps, options.rates):
        usual = tune_settings(TrellisOmniQuant(tune_scales_steps=steps, batch=options.batch))
        settings = replace(usual, scale_rate=rate, vector_rate=rate)
        tuned = tune_scales(
            model, weights, tokens.tokens, tokens.held_out, settings, seed=config.seed
        )
        what = f"tuned, {steps} steps" + (f" at {rate:g}" if rate != TRELLIS_RATE else "")
        what += f" of {options.batch} windows" if options.batch else ""
        what += f" from {options.base}"
        row["tuning"][what] = tuned.report.model_dump(mode="json")
        keep(what, tuned.weights, tuned.vectors)


def table(rows: list[dict[str, Any]], peers: Mapping[str, Any]) -> str:
    """Markdown, by model and bits."""
    made = [found for row in rows for found in row["variants"].values()]
    texts = list(made[0]["excess"])
    head = ["model", "code", "true bits", "what", *(f"ppl {t}" for t in texts)]
    head += [
        *(f"excess {t}" for t in texts),
        "mean excess",
        "over exl3",
        *(f"KL {t}" for t in texts),
        "KL held-out",
        "run",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in sorted(rows, key=lambda row: (row["model"], row["code"], row["bits"])):
        exl3 = [
            (peer["bits"], peer["mean_excess"])
            for name, peer in peers.get(row["model"], {}).items()
            if name.startswith("exl3-")
        ]
        for what, found in row["variants"].items():
            other = at_bits(exl3, found["true_bits"]) if len(exl3) > 1 else None
            what = ", ".join([what, *_apart(row)])
            cells = [row["model"], row["code"], f"{found['true_bits']:.3f}", what]
            cells += [f"{found['perplexity'][text]:.2f}" for text in texts]
            cells += [f"{found['excess'][text]:.4f}" for text in texts]
            cells += [f"{found['mean_excess']:.4f}"]
            cells += [f"{found['mean_excess'] / other:.2f}" if other else ""]
            cells += [f"{found['kl'][text]:.4f}" for text in texts]
            cells += [f"{found['held_out_kl']:.4f}" if "held_out_kl" in found else "", row["run"]]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _apart(row: Mapping[str, Any]) -> Iterator[str]:
    """What sets a row apart from others of its variant."""
    if row.get("allocation", "knapsack") != "knapsack":
        yield f"allocation {row['allocation']}"
    if row.get("calibration"):
        yield f"calibration {json.dumps(row['calibration'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(required=True)
    action = actions.add_parser("measure")
    action.add_argument("source", type=Path)
    action.add_argument("--model", required=True, help="name of its rows")
    action.add_argument("--bits", type=float, required=True)
    action.add_argument("--code", choices=list(METHODS), default="trellis")
    action.add_argument("--calibration", type=json.loads, default={}, help="its fields, as JSON")
    action.add_argument("--allocation", default="knapsack")
    action.add_argument("--variants", nargs="+", default=["plain", "roots", "tuned"])
    action.add_argument("--steps", type=int, nargs="+", default=[100])
    action.add_argument("--rates", type=float, nargs="+", default=[TRELLIS_RATE], help="of tuning")
    action.add_argument("--batch", type=int, help="windows of a step of tuning")
    action.add_argument("--base", choices=list(METHODS["trellis"]), default="roots")
    action.add_argument("--keep", type=Path, help="where profile and codes stay")
    action.add_argument("--run", default="", help="name of this run, a column of the table")
    action.add_argument("--device", default="cuda")
    action.add_argument("--out", type=Path, required=True)
    action.set_defaults(act="measure")
    action = actions.add_parser("table")
    action.add_argument("rows", type=Path, nargs="+")
    action.add_argument("--out", type=Path, required=True, help="without suffix")
    action.add_argument("--note", type=Path, required=True, help="Markdown that stands before it")
    action.set_defaults(act="table")
    options = parser.parse_args()
    if options.act == "measure":
        if options.code != "trellis" and "tuned" in options.variants:
            parser.error("only trellis codes are tuned here: leave `tuned` out of --variants")
        with computing():
            measured(options)
        return
    rows = [row for path in options.rows for row in rows_of(json.loads(path.read_text()))]
    found = table([row for row in rows if row["variants"]], json.loads(PEERS.read_text()))
    note = options.note.read_text()
    write_json(options.out.with_suffix(".json"), {"note": note, "rows": rows})
    write_bytes(options.out.with_suffix(".md"), f"{note}\n{found}\n".encode())
    print(found)


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of what one `measure` or an earlier `table` wrote."""
    rows: list[dict[str, Any]] = found.get("rows", [found])
    return rows


if __name__ == "__main__":
    main()
