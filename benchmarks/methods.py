"""Every method on one bench: perplexity, true bytes, seconds and memory at 2, 3 and 4 bits.

    python benchmarks/methods.py NAME=SOURCE ... --device cuda --jobs 6 --out OUT

SOURCE is a Hugging Face folder. Every linear of the decoder blocks is quantized in groups of 128,
embeddings and head are kept. Windows begin as the tokenizer begins a text: of the bundled
calibration text (seed 0), and all of both evaluation texts. Rows:

    METHOD-WIDTH                one width; columns in their order, or as the method says
    METHOD-knapsack-BITS        widths that the knapsack finds for so many true bits
    METHOD-knapsack-code-WIDTH  the same for a mean width
    METHOD-even-BITS            two widths, spread evenly over all groups: no data decide
    PACKAGE-package-WIDTH       another package, by `methods_peers.py`

Methods in order of activations, by two calibration texts, are the cells of `study.yaml`.

--rows takes patterns of MODEL/ROW. Rows run --jobs at a time, spread over the devices; those that
are recorded in OUT.json already are left out, and refined blocks and profiles stay in WORK, so a
run that was cut short is continued by the same command. Memory is the largest that a row's
refinement held: of the device, or resident. Packages need what they import on --packages. Small
models are bound by Python and launches, so every row wants two or three cores to itself, and
nothing else should run beside.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from bitmill.allocation.allocator import allocate
from bitmill.allocation.profile import SensitivityProfile
from bitmill.calibration.windows import CalibrationSet, calibration_tokens, evaluation_tokens
from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.config.quantization import Calibration, QuantizationConfig, parse_config
from bitmill.evaluation.compare import Candidate, measure, with_weights
from bitmill.evaluation.count import Count
from bitmill.evaluation.logits import StreamedLogits
from bitmill.formats.accounting import footprint
from bitmill.io.atomic import read_json, write_json
from bitmill.models.rewrite_source import rewrite_source
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import Plan, make_plan, plan_source
from bitmill.plan.source_model import read_source
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.runtime.process import computing, settle_own_process
from bitmill.sensitivity.fisher import SensitivitySettings, profile_knapsack

REWRITTEN, PROFILE, MADE = "source", "profile", "made.json"
TEXTS = ("wiki_evaluation", "handbook_evaluation")
GOLDEN = (math.sqrt(5) - 1) / 2
Entry = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A row's `refinement`, at each of some widths, at some true bits and at some mean widths
    (codes) by the knapsack, and at some bits by widths spread evenly. order: of columns. text: of
    calibration."""

    name: str
    refinement: dict[str, Any] = field(default_factory=dict)
    widths: tuple[int, ...] = (2, 3, 4)
    bits: tuple[float, ...] = ()
    codes: tuple[int, ...] = ()
    even: tuple[float, ...] = ()
    order: str = "natural"
    code: str = "auto"
    text: str = "wiki_calibration"


RTN, GPTQ = {"method": "rtn"}, {"method": "gptq"}
AWQ, QUAROT = [{"name": "awq"}], [{"name": "quarot"}]
VALUES = [{"name": "quarot", "parts": ["values"]}]
CLIPPING = {"method": "omniquant", "omniquant": {"mode": "clipping"}}
G64 = (3.297, 4.312)
"""True bits of 3 and 4 bits in groups of 64 with zero points: knapsacks that take no more."""
HQQ_BITS = (3.5, 4.5)
MIXTURE = "mixture_calibration"
STUDIED = (2, 3, 4)
METHODS = (
    Method("rtn-minmax", {"method": "rtn", "clip_search": False}),
    Method("rtn", RTN),
    Method("hqq", {"method": "hqq"}, bits=HQQ_BITS, even=HQQ_BITS),
    Method("awq-minmax", {"method": "rtn", "clip_search": False, "transforms": AWQ}, bits=G64),
    Method("awq", {"method": "rtn", "transforms": AWQ}, bits=G64),
    Method("gptq", GPTQ, bits=(2.5, 3.148, 4.156)),
    Method("gptq-order", GPTQ, bits=(2.5, 3.16, *G64, 4.17), codes=STUDIED, order="activation"),
    Method("gptq-order-mixture", GPTQ, codes=STUDIED, order="activation", text=MIXTURE),
    Method("rtn-order", RTN, codes=STUDIED, order="activation"),
    Method("rtn-order-mixture", RTN, codes=STUDIED, order="activation", text=MIXTURE),
    Method("gptq-awq", {"method": "gptq", "transforms": AWQ}),
    Method("normtweaking", {"method": "normtweaking"}),
    Method("gptq-quarot", {"method": "gptq", "transforms": QUAROT}, bits=(3.148,)),
    Method("gptq-quarot-values", {"method": "gptq", "transforms": VALUES}, bits=(3.148,)),
    Method("rtn-quarot-values", {"method": "rtn", "transforms": VALUES}),
    Method("trellis", GPTQ, code="trellis"),
    Method("trellis-quarot", {"method": "gptq", "transforms": QUAROT}, code="trellis"),
    Method("trellis-quarot-values", {"method": "gptq", "transforms": VALUES}, code="trellis"),
    Method("omniquant-clipping-minmax", CLIPPING | {"clip_search": False}),
    Method("omniquant-clipping", CLIPPING),
    Method("omniquant", {"method": "omniquant"}),
)
PACKAGES = ("hqq", "llmcompressor-awq", "llmcompressor-gptq")
PAIRS = {
    "hqq": ("hqq",),
    "llmcompressor-awq": ("awq", "awq-minmax"),
    "llmcompressor-gptq": ("gptq", "gptq-order"),
}
"""Rows of ours that a package's are held against."""


def rows_of(method: Method) -> list[str]:
    """Names of a method's rows."""
    rows = [f"{method.name}-{width}" for width in method.widths]
    rows += [f"{method.name}-knapsack-{bits}" for bits in method.bits]
    rows += [f"{method.name}-knapsack-code-{width}" for width in method.codes]
    return rows + [f"{method.name}-even-{bits}" for bits in method.even]


def row_names() -> list[str]:
    """All rows, those of other packages last."""
    ours = [row for method in METHODS for row in rows_of(method)]
    return ours + [f"{package}-package-{width}" for package in PACKAGES for width in (3, 4)]


def method_of(row: str) -> Method:
    """What a row of ours is made by."""
    return next(method for method in METHODS if row in rows_of(method))


@dataclass(frozen=True)
class Bench:
    """What all rows have in common: windows (count, length), 0 for all, and where they run."""

    work: Path
    calibration: tuple[int, int]
    held_out: int
    evaluation: tuple[int, int]
    device: str
    threads: int
    packages: str

    def configuration(self, row: str) -> QuantizationConfig:
        """What a row of ours asks for."""
        method, budget = method_of(row), row.rpartition("-")[2]
        sequences, length = self.calibration
        mixed = row in {f"{method.name}-{kind}-{budget}" for kind in ("knapsack", "even")}
        asked = {
            "budget": {"bits" if mixed else "code_bits": float(budget)},
            "allocation": {
                "method": "knapsack" if f"{method.name}-knapsack" in row else "uniform",
                "order": method.order,
            },
            "refinement": method.refinement,
            "code": method.code,
            "calibration": {
                "sequences": sequences,
                "length": length,
                "held_out": self.held_out,
                "text": {"source": "bundled", "name": method.text},
            },
        }
        return parse_config(asked)

    def opened(self, source: Path, plan: Plan) -> StreamedModel:
        """The float model."""
        return StreamedModel(source, plan, device=torch.device(self.device), dtype=torch.float32)

    def windows(self, source: Path) -> dict[str, Tensor]:
        """Those of the evaluation texts."""
        count, length = self.evaluation
        return {
            name: evaluation_tokens(name, source, length=length, sequences=count or None)
            for name in TEXTS
        }

    def row(self, model: str, source: Path, row: str) -> Entry:
        """Make a row and measure it."""
        folder = self.work / model / row
        folder.mkdir(parents=True, exist_ok=True)
        package = any(row.startswith(f"{package}-package") for package in PACKAGES)
        started = time.perf_counter()
        with computing(self.threads):
            entry = (self._package if package else self._ours)(source, folder, row)
        return entry | {"whole_seconds": round(time.perf_counter() - started, 1)}

    def _ours(self, source: Path, folder: Path, row: str) -> Entry:
        config = self.configuration(row)
        own = rewritten(source, folder.parent, config)
        plan = plan_source(read_source(own), config)
        model = self.opened(own, plan)
        tokens = tokens_of(source, config.calibration.model_dump_json(), config.seed)
        shared = folder.parent if own == source else own
        chosen, orders = self._map(model, tokens, config, shared, row)
        (folder / MAP_NAME).write_text(chosen.to_json())
        begin_memory(self.device)
        started = time.perf_counter()
        refine_model(
            model,
            RefineInputs(tokens, chosen, orders),
            config.method,
            folder,
            seed=config.seed,
            on_unit=lambda *_: None,
            transforms=config.transforms,
        )
        entry = {"seconds": round(time.perf_counter() - started, 1), "memory": memory(self.device)}
        refined, spent = RefinedModel(folder, model.plan), footprint(model.plan, chosen)
        weights = {one.name: refined.linear(one.name).dequantize() for one in model.plan.linears}
        logits = with_weights(model, weights.__getitem__, refined.changed)
        texts = self._measured(source, Candidate(chosen, logits, model.plan))
        return entry | {"bits": spent.bits, "bytes": spent.size, "texts": texts}

    def _package(self, source: Path, folder: Path, row: str) -> Entry:
        package, _, width = row.rpartition("-")
        if not (folder / MADE).exists():
            script = Path(__file__).with_name("methods_peers.py")
            count, length = self.calibration
            asked = [package.removesuffix("-package"), source, folder, "--bits", width]
            asked += ["--calibration", count, length, "--device", self.device]
            path = os.pathsep.join([*filter(None, self.packages.split(os.pathsep)), *sys.path])
            subprocess.run(
                [sys.executable, script, *map(str, asked)],
                check=True,
                env=os.environ | {"PYTHONPATH": path},
            )
        made: Entry = read_json(folder / MADE)
        weights = safe_open(folder / "model.safetensors", framework="pt")
        plan, model = plan_of(source), float_model(self, source)
        vectors = {
            tensor.module: weights.get_tensor(tensor.name)
            for tensor in plan.tensors
            if len(tensor.shape) == 1 and tensor.module.startswith(plan.block_prefix)
        }
        logits = with_weights(model, lambda name: weights.get_tensor(f"{name}.weight"), vectors)
        candidate = Candidate(BitWidthMap.uniform(plan.shapes, 8), logits, plan)
        return made | {"texts": self._measured(source, candidate)}

    def _map(
        self,
        model: StreamedModel,
        tokens: CalibrationSet,
        config: QuantizationConfig,
        shared: Path,
        row: str,
    ) -> tuple[BitWidthMap, dict[str, Tensor]]:
        """The row's map, and the column orders of its linears where they have some."""
        if "-even-" in row:
            return even_map(model.plan, config.budget.bits or 0.0), {}
        order = config.allocation.order
        if config.allocation.method == "uniform" and order == "natural":
            return allocate(model.plan, config), {}
        text = method_of(row).text
        profile = self._profile(model, tokens, shared / f"{PROFILE}-{order}-{text}", order)
        orders = {owner: torch.tensor(one).long() for owner, one in profile.orders.items()}
        of = {one.name: orders[one.order] for one in profile.linears if one.order is not None}
        return allocate(model.plan, config, profile), of

    def _profile(
        self, model: StreamedModel, tokens: CalibrationSet, path: Path, order: Any
    ) -> SensitivityProfile:
        """Measured by the first row that asks for it; others wait."""
        with alone(path):
            if not path.exists():
                settings = SensitivitySettings(order=order)
                partial = path.with_suffix(".partial")
                partial.mkdir(exist_ok=True)
                made = profile_knapsack(model, tokens.tokens, model.plan, settings, folder=partial)
                made.save(path)
            return SensitivityProfile.load(path)

    def _measured(self, source: Path, candidate: Candidate) -> Entry:
        """Perplexity and KL on each text."""
        model = float_model(self, source)
        windows, known = source_outputs(self, source)
        whole, found = measure(
            model, windows, {"row": candidate}, Count(lambda *_: None, 0), known=known
        )
        texts = {}
        for name in TEXTS:
            own = found.texts[name].model_dump(mode="json")
            texts[name] = own | {"source_perplexity": whole.texts[name].perplexity}
        return texts


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Nobody else makes `path` meanwhile."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def rewritten(source: Path, folder: Path, config: QuantizationConfig) -> Path:
    """The float model that a row quantizes: the source, or what transforms make of it."""
    if not config.source_transforms:
        return source
    name = "-".join(one.model_dump_json() for one in config.source_transforms)
    own = folder / f"{REWRITTEN}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    with alone(own):
        if not own.exists():
            rewrite_source(source, own, config.source_transforms)
    return own


@cache
def tokens_of(source: Path, calibration: str, seed: int) -> CalibrationSet:
    """Calibration windows, of the JSON of what asks for them."""
    return calibration_tokens(Calibration.model_validate_json(calibration), source, seed=seed)


@cache
def plan_of(source: Path) -> Plan:
    """The plan of a source whose map does not matter."""
    return make_plan(source, parse_config({"budget": {"bits": 16}}))


@cache
def float_model(bench: Bench, source: Path) -> StreamedModel:
    """The source, opened once a process."""
    return bench.opened(source, plan_of(source))


@cache
def source_outputs(bench: Bench, source: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Evaluation windows of a model, and what its last block makes of them."""
    windows = bench.windows(source)
    logits = StreamedLogits(float_model(bench, source))
    with torch.no_grad():
        return windows, {name: logits.last_block(tokens) for name, tokens in windows.items()}


def even_map(plan: Plan, bits: float) -> BitWidthMap:
    """Two neighbouring widths, spread evenly over all groups, that take at most so many bits."""
    names = [(shape.name, g) for shape in plan.shapes for g in range(shape.groups)]
    places = [(i * GOLDEN) % 1 for i in range(len(names))]

    def spread(low: int, wider: int) -> BitWidthMap:
        linears: dict[str, tuple[int, ...]] = {}
        chosen = set(sorted(range(len(names)), key=places.__getitem__)[:wider])
        for i, (name, _) in enumerate(names):
            linears[name] = (*linears.get(name, ()), low + (i in chosen))
        return BitWidthMap(order="natural", linears=linears)

    low = max(w for w in (2, 3, 4, 5) if footprint(plan, spread(w, 0)).bits <= bits)
    least, most = 0, len(names)
    while most - least > 1:
        middle = (least + most) // 2
        fits = footprint(plan, spread(low, middle)).bits <= bits
        least, most = (middle, most) if fits else (least, middle)
    return spread(low, least)


def begun(bench: Bench, until: float, model: str, source: Path, row: str) -> Entry | None:
    """The row, or None where it is too late to begin it; in a process of the pool."""
    return None if time.time() > until else bench.row(model, source, row)


def begin_memory(device: str) -> None:
    """Forget what was held before."""
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(device: str) -> int:
    """Most bytes held since: of the device, or resident in the process's whole life."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def settle(devices: int, counter: Any) -> None:
    """A process of the pool: every one sees one of the accelerators, the next in turn."""
    settle_own_process()
    if devices:
        with counter.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = str(counter.value % devices)
            counter.value += 1


def comparisons(rows: dict[str, Entry]) -> list[str]:
    """Ours against each package, at no more true bits than it takes."""
    lines = []
    for package, ours in PAIRS.items():
        for name in (f"{package}-package-{width}" for width in (3, 4)):
            if name not in rows:
                continue
            peer = rows[name]
            for row, entry in rows.items():
                known = row in row_names() and "-package-" not in row
                within = peer["bits"] - 0.5 < entry["bits"] <= peer["bits"] + 0.001
                if not known or method_of(row).name not in ours or not within:
                    continue
                ratios = [
                    entry["texts"][t]["perplexity"] / peer["texts"][t]["perplexity"] for t in TEXTS
                ]
                lines.append(
                    f"| {name} | {peer['bits']:.3f} | {row} | {entry['bits']:.3f} "
                    f"| {ratios[0]:.3f} | {ratios[1]:.3f} |"
                )
    head = [
        "| package | true bits | ours | true bits | wiki perplexity, ours / package | handbook |"
    ]
    return [*head, "|---|---|---|---|---|---|", *lines] if lines else []


def study(rows: dict[str, Entry]) -> list[str]:
    """KL on both texts by calibration text and allocation, where cells of the study are there."""
    kinds = {"wiki, one width": "", "wiki, knapsack": "-knapsack-code"}
    names = {told: f"-order{kind}" for told, kind in kinds.items()}
    names |= {f"mixture{told[4:]}": f"-order-mixture{kind}" for told, kind in kinds.items()}
    lines = []
    for method in ("rtn", "gptq"):
        for width in STUDIED:
            cells = [rows.get(f"{method}{name}-{width}") for name in names.values()]
            told = [
                " / ".join(f"{cell['texts'][t]['kl']:.3f}" for t in TEXTS) if cell else ""
                for cell in cells
            ]
            if sum(map(bool, cells)) > 1:
                lines.append(f"| {method} | {width} | {' | '.join(told)} |")
    head = f"| method | code bits | {' | '.join(names)} |"
    return ["", "KL, wiki / handbook:", "", head, "|---" * 6 + "|", *lines] if lines else []


def markdown(state: dict[str, Any]) -> str:
    """The tables of a results file."""
    lines = [
        "# Methods side by side",
        f"{state['windows']} Command: `{state['command']}`.",
        "",
        f"Machine: {state['machine']}, commit {state['commit']}. Seconds and memory are those of "
        f"refinement, of {state['jobs']} rows at a time; ± is the standard error over windows.",
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
        for name, entry in sorted(rows.items(), key=lambda row: (round(row[1]["bits"]), row[0])):
            own = [
                f"{entry['texts'][t]['perplexity']:.2f} "
                f"| {entry['texts'][t]['kl']:.4f} ± {entry['texts'][t]['kl_se']:.4f}"
                for t in TEXTS
            ]
            size = f"{entry['bytes']:,}" if "bytes" in entry else ""
            lines.append(
                f"| {name} | {entry['bits']:.3f} | {size} | {' | '.join(own)} "
                f"| {entry['seconds']:.0f} | {entry['memory'] / 1e9:.1f} |"
            )
        lines += ["", *comparisons(rows), *study(rows)]
    return "\n".join(lines) + "\n"


def named(text: str) -> tuple[str, Path]:
    """NAME=PATH"""
    name, _, path = text.partition("=")
    return name, Path(path)


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", type=named, nargs="+", metavar="NAME=SOURCE")
    parser.add_argument("--work", type=Path, default=Path("build/methods"))
    parser.add_argument("--out", type=Path, default=Path("build/methods/rows"))
    parser.add_argument("--rows", nargs="*", default=["*"], help="patterns of MODEL/ROW, in turn")
    parser.add_argument("--calibration", type=int, nargs=2, default=(64, 2048))
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--evaluation", type=int, nargs=2, default=(0, 2048), help="0: all windows")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each row")
    parser.add_argument("--packages", default="", help="path of what other packages import")
    parser.add_argument("--limit", type=float, default=math.inf, help="no row begins after seconds")
    parser.add_argument("--commit", default="", help="of the code, for the record")
    return parser.parse_args()


def described(options: argparse.Namespace) -> dict[str, Any]:
    """What a results file says of its run."""
    sequences, length = options.calibration
    windows, tokens = options.evaluation
    cuda = options.device == "cuda"
    name = f"{torch.cuda.device_count()} {torch.cuda.get_device_name()}, " if cuda else ""
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": options.commit,
        "jobs": options.jobs,
        "windows": f"Calibration {sequences} windows of {length} tokens, evaluation "
        f"{windows or 'all'} windows of {tokens} of each text.",
        "machine": f"{name}{os.cpu_count()} CPU cores ({platform.machine()}), {options.threads} "
        f"threads a row, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
    }


def main() -> None:
    options = arguments()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    store = options.out.with_suffix(".json")
    state = json.loads(store.read_text()) if store.exists() else {"models": {}}
    state |= described(options)
    every = [(model, source, row) for model, source in options.sources for row in row_names()]
    wanted = [one for p in options.rows for one in every if fnmatch(f"{one[0]}/{one[2]}", p)]
    missing = [
        one for one in dict.fromkeys(wanted) if one[2] not in state["models"].get(one[0], {})
    ]
    bench = Bench(
        options.work,
        tuple(options.calibration),
        options.held_out,
        tuple(options.evaluation),
        options.device,
        options.threads,
        options.packages,
    )
    devices = torch.cuda.device_count() if options.device == "cuda" else 0
    for _, source in options.sources:
        plan_of(source)  # refuses what is no model before any process starts
    started, context = time.monotonic(), get_context("spawn")
    fresh = None if devices else 1
    pool = ProcessPoolExecutor(
        options.jobs,
        mp_context=context,
        initializer=settle,
        initargs=(devices, context.Value("i", 0)),
        max_tasks_per_child=fresh,
    )
    failed = False
    with pool:
        rows: dict[Future[Entry | None], tuple[str, str]] = {
            pool.submit(begun, bench, time.time() + options.limit, *one): (one[0], one[2])
            for one in missing
        }
        for done in as_completed(rows):
            model, row = rows[done]
            if (error := done.exception()) is not None:
                print(f"{model}/{row} FAILED: {error!r}"[:2000], flush=True)
                failed = True
                continue
            entry = done.result()
            if entry is None:
                continue
            state["models"].setdefault(model, {})[row] = entry
            write_json(store, state)
            options.out.with_suffix(".md").write_text(markdown(state))
            figures = [round(entry["texts"][text]["perplexity"], 3) for text in TEXTS]
            taken = round(time.monotonic() - started)
            print(
                taken,
                model,
                row,
                round(entry["bits"], 3),
                figures,
                entry["seconds"],
                entry["whole_seconds"],
                flush=True,
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
