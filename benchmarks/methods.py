"""Every method on one bench: perplexity, true bytes, seconds and memory at 2, 3 and 4 bits.

    python benchmarks/methods.py NAME=SOURCE --work WORK --out benchmarks/results/methods

SOURCE is a Hugging Face folder. Every linear of the decoder blocks is quantized at one width in
natural column order, in groups of 128; embeddings and head are kept. Rows `NAME-knapsack-BITS` have
the widths that the knapsack finds for so many true bits. Windows begin as the tokenizer
begins a text, of the bundled calibration text (seed 0) and, all of them or --evaluation, of both
evaluation texts. A row runs in a process of its own, whose largest resident memory is recorded, and
refined blocks stay in WORK, so that a run that was cut short is continued by the same command.

--folder ROW=FOLDER,BITS measures float weights of the same model that another package wrote
(`methods_peers.py`) on the same windows. --rows takes names or patterns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from bitmill.allocation.allocator import allocate
from bitmill.calibration.windows import CalibrationSet, calibration_tokens, evaluation_tokens
from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.config.quantization import QuantizationConfig, parse_config
from bitmill.evaluation.compare import Candidate, measure, with_weights
from bitmill.formats.accounting import footprint
from bitmill.models.rewrite_source import rewrite_source
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import Plan, make_plan, plan_source
from bitmill.plan.source_model import read_source
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.sensitivity.fisher import SensitivitySettings, profile_knapsack

REWRITTEN = "source"
TEXTS = ("wiki_evaluation", "handbook_evaluation")


@dataclass(frozen=True)
class Method:
    """A row's `refinement`, at each of some widths, and at some true bits by the knapsack."""

    name: str
    refinement: dict[str, Any] = field(default_factory=dict)
    widths: tuple[int, ...] = (2, 3, 4)
    bits: tuple[float, ...] = ()


AWQ, QUAROT = [{"name": "awq"}], [{"name": "quarot"}]
VALUES = [{"name": "quarot", "parts": ["values"]}]
METHODS = (
    Method("rtn-minmax", {"method": "rtn", "clip_search": False}),
    Method("rtn", {"method": "rtn"}),
    Method("hqq", {"method": "hqq"}, bits=(3.5, 4.5)),
    Method("awq-minmax", {"method": "rtn", "clip_search": False, "transforms": AWQ}),
    Method("awq", {"method": "rtn", "transforms": AWQ}),
    Method("rtn-quarot", {"method": "rtn", "transforms": QUAROT}, bits=(3.16,)),
    Method("gptq", {"method": "gptq"}, bits=(2.5, 3.16)),
    Method("gptq-quarot", {"method": "gptq", "transforms": QUAROT}, bits=(2.5, 3.16)),
    Method("gptq-quarot-values", {"method": "gptq", "transforms": VALUES}, bits=(2.5, 3.16)),
    Method("gptq-awq", {"method": "gptq", "transforms": AWQ}),
)


def row_names() -> list[str]:
    """All rows of Bitmill's own methods."""
    uniform = [f"{method.name}-{width}" for method in METHODS for width in method.widths]
    return uniform + [f"{each.name}-knapsack-{bits}" for each in METHODS for bits in each.bits]


def configuration(options: argparse.Namespace, name: str) -> QuantizationConfig:
    """What row `name` asks for."""
    title, _, budget = name.rpartition("-")
    knapsack = title.endswith("-knapsack")
    method = next(one for one in METHODS if one.name == title.removesuffix("-knapsack"))
    sequences, length = options.calibration
    asked = {
        "budget": {"bits" if knapsack else "code_bits": float(budget)},
        "allocation": {"method": "knapsack" if knapsack else "uniform", "order": "natural"},
        "refinement": method.refinement,
        "calibration": {"sequences": sequences, "length": length, "held_out": options.held_out},
    }
    return parse_config(asked)


def allocated(
    model: StreamedModel, tokens: CalibrationSet, plan: Plan, config: QuantizationConfig
) -> BitWidthMap:
    """The map that the row's allocation makes."""
    if config.allocation.method == "uniform":
        return allocate(plan, config)
    settings = SensitivitySettings(order="natural")
    return allocate(plan, config, profile_knapsack(model, tokens.tokens, plan, settings))


def refine(source: Path, folder: Path, options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Refine a row into `folder`; seconds and bytes of memory that it took."""
    torch.set_num_threads(options.threads)
    config = configuration(options, name)
    started = time.perf_counter()
    if config.source_transforms:
        rewrite_source(source, folder / REWRITTEN, config.source_transforms)
    model = opened(*row_source(source, folder, config))
    plan = model.plan
    tokens = calibration_tokens(config.calibration, source, seed=config.seed)
    chosen = allocated(model, tokens, plan, config)
    (folder / MAP_NAME).write_text(chosen.to_json())
    refine_model(
        model,
        RefineInputs(tokens, chosen, {}),
        config.method,
        folder,
        seed=config.seed,
        on_unit=lambda *_: None,
        transforms=config.transforms,
    )
    taken = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": round(taken, 1), "memory": memory, "load": os.getloadavg()[0]}


def row_source(source: Path, folder: Path, config: QuantizationConfig) -> tuple[Path, Plan]:
    """The float model that a row quantizes: what transforms of the source left in its folder."""
    own = folder / REWRITTEN if config.source_transforms else source
    return own, plan_source(read_source(own), config)


def opened(source: Path, plan: Plan) -> StreamedModel:
    """The float model."""
    return StreamedModel(source, plan, device=torch.device("cpu"), dtype=torch.float32)


def refined_candidate(model: StreamedModel, folder: Path) -> tuple[Candidate, dict[str, Any]]:
    """A refined row of the float model that it quantized, and what it takes."""
    plan = model.plan
    refined, chosen = RefinedModel(folder, plan), BitWidthMap.load(folder / MAP_NAME)
    spent = footprint(plan, chosen)
    logits = with_weights(model, lambda name: refined.linear(name).dequantize(), refined.changed)
    return Candidate(chosen, logits, plan), {"bits": spent.bits, "bytes": spent.size}


def given_candidate(model: StreamedModel, plan: Plan, folder: Path) -> Candidate:
    """The float weights of a folder."""
    weights = safe_open(folder / "model.safetensors", framework="pt")
    vectors = {
        tensor.module: weights.get_tensor(tensor.name)
        for tensor in plan.tensors
        if len(tensor.shape) == 1 and tensor.module.startswith(plan.block_prefix)
    }
    logits = with_weights(model, lambda name: weights.get_tensor(f"{name}.weight").float(), vectors)
    return Candidate(BitWidthMap.uniform(plan.shapes, 8), logits, plan)


def measured(
    candidate: Candidate, model: StreamedModel, windows: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Perplexity and KL on each text."""
    source, found = measure(model, windows, {"row": candidate}, lambda *_: None)
    texts = {}
    for name in TEXTS:
        own, whole = found.texts[name], source.texts[name]
        texts[name] = {
            "perplexity": own.perplexity,
            "perplexity_se": own.perplexity_se,
            "source_perplexity": whole.perplexity,
            "kl": own.kl,
            "kl_se": own.kl_se,
        }
    return texts


def work(options: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Model, name and figures of every row that is asked for."""
    known = row_names()
    wanted = [n for p in options.rows for n in known if fnmatch(n, p)]
    for model_name, source in options.sources:
        plan = make_plan(source, configuration(options, known[0]))
        model, (count, length) = opened(source, plan), options.evaluation
        windows = {
            name: evaluation_tokens(name, source, length=length, sequences=count or None)
            for name in TEXTS
        }
        for name in dict.fromkeys(wanted):
            folder = options.work / model_name / name
            folder.mkdir(parents=True, exist_ok=True)
            fresh = get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=fresh) as child:
                entry = child.submit(refine, source, folder, options, name).result()
            own = row_source(source, folder, configuration(options, name))
            candidate, taken = refined_candidate(opened(*own), folder)
            yield model_name, name, entry | taken | {"texts": measured(candidate, model, windows)}
        for name, folder, bits in options.folders:
            candidate = given_candidate(model, plan, folder)
            yield model_name, name, {"bits": bits, "texts": measured(candidate, model, windows)}


def markdown(state: dict[str, Any]) -> str:
    """The table of a results file."""
    lines = [
        "# Methods side by side",
        f"{state['windows']} Command: `{state['command']}`.",
        "",
        f"Machine: {state['machine']}, commit {state['commit']}. Seconds and memory are those of "
        "refinement; other work ran on the machine (load average in the JSON).",
    ]
    for model, rows in state["models"].items():
        first = next(iter(rows.values()))["texts"]
        lines += [
            "",
            f"## {model}: "
            + ", ".join(f"{text} {first[text]['source_perplexity']:.2f}" for text in TEXTS),
            "| row | true bits | bytes | wiki perplexity | KL | handbook perplexity | KL "
            "| s | GB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, entry in sorted(rows.items(), key=lambda row: (row[0].split("-")[-1], row[0])):
            own = [
                f"{entry['texts'][t]['perplexity']:.2f} | {entry['texts'][t]['kl']:.3f}"
                for t in TEXTS
            ]
            size = f"{entry['bytes']:,}" if "bytes" in entry else ""
            seconds = f"{entry['seconds']:.0f}" if "seconds" in entry else ""
            memory = f"{entry['memory'] / 1e9:.1f}" if "memory" in entry else ""
            lines.append(
                f"| {name} | {entry['bits']:.3f} | {size} | {' | '.join(own)} | {seconds} "
                f"| {memory} |"
            )
    return "\n".join(lines) + "\n"


def named(text: str) -> tuple[str, Path]:
    """NAME=PATH"""
    name, _, path = text.partition("=")
    return name, Path(path)


def given(text: str) -> tuple[str, Path, float]:
    """ROW=FOLDER,BITS"""
    name, _, rest = text.partition("=")
    path, _, bits = rest.rpartition(",")
    return name, Path(path), float(bits)


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", type=named, nargs="+", metavar="NAME=SOURCE")
    parser.add_argument("--work", type=Path, default=Path("build/methods"))
    parser.add_argument("--out", type=Path, default=Path("build/methods/rows"))
    parser.add_argument("--rows", nargs="*", default=["*"], help="names or patterns")
    parser.add_argument("--folder", dest="folders", type=given, action="append", default=[])
    parser.add_argument("--calibration", type=int, nargs=2, default=(64, 2048))
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--evaluation", type=int, nargs=2, default=(0, 2048), help="0: all windows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--commit", default="", help="of the code, for the record")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    store = options.out.with_suffix(".json")
    state = json.loads(store.read_text()) if store.exists() else {"models": {}}
    done = [name for rows in state["models"].values() for name in rows]
    print(f"recorded already: {done}", flush=True)
    sequences, length = options.calibration
    windows, tokens = options.evaluation
    state |= {
        "command": " ".join(["python", *sys.argv]),
        "commit": options.commit,
        "windows": f"Calibration {sequences} windows of {length} tokens, evaluation "
        f"{windows or 'all'} windows of {tokens} of each text.",
        "machine": f"2 CPU cores ({platform.machine()}), {options.threads} thread, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}",
    }
    for model, name, entry in work(options):
        state["models"].setdefault(model, {})[name] = entry
        store.write_text(json.dumps(state, indent=1))
        options.out.with_suffix(".md").write_text(markdown(state))
        figures = {text: round(entry["texts"][text]["perplexity"], 3) for text in TEXTS}
        print(model, name, round(entry["bits"], 3), figures, entry.get("seconds"), flush=True)


if __name__ == "__main__":
    main()
