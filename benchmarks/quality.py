"""Perplexity of named variants of allocation and refinement, with the whole model on one device.

    python benchmarks/quality.py SOURCE --device cuda --out benchmarks/results/quality

SOURCE is a Hugging Face folder or a GGUF file (converted once into --work). The protocol:
64 calibration and 16 held-out windows of 2048 tokens of the bundled calibration text (seed 0);
perplexity over all whole windows of both evaluation texts; every linear of the decoder blocks is
quantized, embeddings and head are not; groups of 128. --smoke takes 2 windows of 256 tokens and 1
evaluation window instead, to try the script.

Rows go to OUT.json as they finish, so a run that is cut short is continued by the same command,
and to OUT.md. --variants takes names or patterns and runs them in that order; --list shows them.
Runs side by side may share --work (profiles), not --out. With --device cuda a model of 135M weights
takes about 10 GB of accelerator memory: block inputs stay there.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_variants import Variant, variants
from torch import Tensor, nn
from value_basis import change_basis, value_bases

from bitmill.allocation.allocator import allocate
from bitmill.allocation.profile import (
    ProfileConfig,
    ProfileOrigin,
    SbaRecord,
    SensitivityProfile,
)
from bitmill.calibration.hooks import run_windows
from bitmill.calibration.statistics import BlockState, Stream, collect
from bitmill.calibration.windows import calibration_tokens, evaluation_tokens
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Calibration, parse_config
from bitmill.evaluation.logits import Window, perplexity_and_kl
from bitmill.formats.accounting import footprint
from bitmill.io.atomic import sha256_json
from bitmill.models.convert_gguf import convert_gguf
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import make_plan
from bitmill.refinement.block import refine_block
from bitmill.results import LinearResult
from bitmill.sensitivity.fisher import SensitivitySettings, profile_knapsack
from bitmill.sensitivity.sba import profile_block_sba
from bitmill.solvers.factor import activation_order
from bitmill.transforms.column_order import ColumnOrders

TEXTS = ("wiki_evaluation", "handbook_evaluation")
BATCH = 8


class Windows:
    """Final hidden states [S, T, D] as evaluation reads them."""

    def __init__(self, model: StreamedModel, hidden: Tensor) -> None:
        self._model, self._hidden = model, hidden

    def windows(self, tokens: Tensor) -> Iterator[Window]:
        """Logits of each window, slice by slice."""
        for hidden in self._hidden:
            yield partial(self._head, hidden[None])

    @torch.no_grad()
    def _head(self, hidden: Tensor, begin: int, end: int) -> Tensor:
        return self._model.logits(hidden[:, begin:end])[0]


class FastModel(StreamedModel):
    """Block runs of calibration may use TF32; everything else, evaluation too, is full fp32."""

    fast = False
    bases: list[Tensor] | None = None
    """Bases of the values of attention, where they are not the source's."""

    def load_block(self, i: int) -> nn.Module:
        """See `StreamedModel`."""
        block = super().load_block(i)
        if self.bases:
            change_basis(self, i, block, self.bases[i])
        return block

    def run_block(self, i: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """See `StreamedModel`."""
        torch.set_float32_matmul_precision("high" if self.fast else "highest")
        try:
            return super().run_block(i, block, hidden)
        finally:
            torch.set_float32_matmul_precision("highest")


class Bench:
    """The source model, its tokens and everything that variants share."""

    def __init__(self, source: Path, options: argparse.Namespace) -> None:
        device, work, smoke = torch.device(options.device), options.work, options.smoke
        self.work: Path = work
        self.tf32: bool = options.tf32
        folder = source
        if source.suffix == ".gguf":
            folder = work / "source"
            if not folder.exists():
                convert_gguf(source, folder)
        self.plan = make_plan(folder, spec_of({"budget": {"code_bits": 3}}))
        self.model = FastModel(folder, self.plan, device=device, dtype=torch.float32)
        shape = {"sequences": 2, "held_out": 1, "length": 256} if smoke else {}
        text = {"name": getattr(options, "text", "wiki_calibration")}
        calibration = Calibration.model_validate({"text": text | {"source": "bundled"}} | shape)
        self.tokens = calibration_tokens(calibration, folder)
        length, count = calibration.length, 1 if smoke else None
        self.texts = {
            name: evaluation_tokens(name, folder, length=length, sequences=count) for name in TEXTS
        }
        self._bases: list[Tensor] = []
        self._orders: dict[str, Tensor] = {}
        self.load()
        self.reference = {name: self.run(self.blocks, text) for name, text in self.texts.items()}
        self._profiles: dict[str, SensitivityProfile] = {}
        self._sba: dict[str, dict[str, SbaRecord]] = {}

    def load(self, bases: list[Tensor] | None = None) -> None:
        """Take the blocks from the source anew, with their values in other bases where given."""
        self.model.bases = bases
        self._orders = {}
        self.blocks = [self.model.load_block(i) for i in range(self.plan.block_count)]

    def prepare(self, variant: Variant) -> None:
        """Put the blocks into the basis that the variant wants."""
        if variant.value_basis and not self._bases:
            self.load()
            self._bases = value_bases(self.model, self.tokens.tokens, variant.profile.gradients)
        if variant.value_basis != bool(self.model.bases):
            self.load(self._bases if variant.value_basis else None)

    def embed(self, tokens: Tensor) -> Tensor:
        """Block inputs [S, T, D] on the device."""
        parts = torch.split(tokens, BATCH)
        return torch.cat([self.model.embed(part) for part in parts])

    def run(self, blocks: list[nn.Module], tokens: Tensor) -> Tensor:
        """Final hidden states [S, T, D] of a model given by its blocks."""
        hidden = self.embed(tokens)
        for i, block in enumerate(blocks):
            hidden = run_windows(self.model, i, block, hidden, batch=BATCH)
        return hidden

    def profile(self, variant: Variant) -> SensitivityProfile:
        """The profile a variant asks for, made once."""
        settings = replace(variant.profile, order=variant.order)
        key = json.dumps([identity(settings), variant.value_basis], sort_keys=True)
        if key not in self._profiles:
            folder = self.profile_folder(variant)
            with one_at_a_time(folder):
                self._profiles[key] = profile_knapsack(
                    self.model, self.tokens.tokens, self.plan, settings, folder=folder
                )
        return self._profiles[key]

    def profile_folder(self, variant: Variant) -> Path:
        """Where the profile of a variant is kept between runs."""
        settings = identity(replace(variant.profile, order=variant.order))
        parts = [settings, self.tokens.digest] + ["basis"] * variant.value_basis
        digest: str = sha256_json(parts)
        return self.work / f"profile-{digest[:12]}"

    def orders(self) -> dict[str, Tensor]:
        """Activation order of every linear's input in the source model, i64 [K]."""
        if not self._orders:
            hidden = self.embed(self.tokens.tokens)
            for i, block in enumerate(self.blocks):
                state = BlockState(self.model, i, block, None, self.model.linears(block, i))
                seen = collect(state, self.plan.siblings(i), Stream(hidden), batch=BATCH)
                self._orders |= {name: activation_order(s.H.diagonal()) for name, s in seen.items()}
                hidden = run_windows(self.model, i, block, hidden, batch=BATCH)
        return self._orders

    def sba(self, variant: Variant, base: int) -> dict[str, SbaRecord]:
        """SBA records of all linears at a base width, on the source model's inputs."""
        if variant.order not in self._sba:
            records: dict[str, SbaRecord] = {}
            hidden = self.embed(self.tokens.tokens)
            orders = self.orders() if variant.order == "activation" else None
            for i, block in enumerate(self.blocks):
                found, _ = profile_block_sba(
                    self.model, i, block, Stream(hidden), base, order=variant.order, orders=orders
                )
                records |= found
            self._sba[variant.order] = records
        return self._sba[variant.order]


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Runs side by side that share --work make a profile once; the others wait for its blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def identity(settings: SensitivitySettings) -> dict[str, Any]:
    """The settings that decide a profile, as JSON; memory limits do not."""
    named = asdict(settings)
    for name in ("host_bytes", "every"):
        del named["gradients"][name]
    return named


def spec_of(parts: Mapping[str, Any]) -> Any:
    """A job specification for a local model."""
    return parse_config(parts)


def allocation(bench: Bench, variant: Variant) -> tuple[BitWidthMap, float | None]:
    """The variant's map and the loss predicted for it."""
    widths = list(variant.profile.widths) if variant.method == "knapsack" else [1, 2, 3, 4, 5, 6]
    spec = spec_of(
        {
            "budget": {"code_bits": variant.code_bits},
            "allocation": {
                "method": variant.method,
                "order": variant.order,
                "widths": widths,
                "fuse_siblings": variant.fuse_siblings,
            },
        }
    )
    if variant.method == "uniform":
        return allocate(bench.plan, spec), None
    if variant.method == "knapsack":
        profile = bench.profile(variant)
        chosen = allocate(bench.plan, spec, profile)
        return chosen, profile.predicted_loss(chosen.linears)
    base = int(variant.code_bits)
    return allocate(bench.plan, spec, sba_profile(bench, variant, base)), None


def sba_profile(bench: Bench, variant: Variant, base: int) -> SensitivityProfile:
    from bitmill.allocation.profile import (
        LinearProfile,
    )

    records = bench.sba(variant, base)
    owners: dict[str, str] = {}
    orders: dict[str, Any] = {}
    if variant.order == "activation":
        for i in range(bench.plan.block_count):
            for group in bench.plan.siblings(i):
                owners |= dict.fromkeys(group, group[0])
                orders[group[0]] = bench.orders()[group[0]].cpu().numpy().astype(np.int32)
    linears = tuple(
        LinearProfile(s.name, s.rows, s.columns, np.zeros((s.groups, 0)), owners.get(s.name))
        for s in bench.plan.shapes
    )
    return SensitivityProfile(
        ProfileOrigin(ProfileConfig(kind="sba")), (), linears, orders, {base: records}
    )


def refined(
    bench: Bench, variant: Variant, chosen: BitWidthMap
) -> tuple[list[nn.Module], list[LinearResult]]:
    """Blocks with dequantized weights, and what refinement says of each linear."""
    orders = bench.orders() if variant.order == "activation" else {}
    settings = replace(variant.refine, batch=BATCH, transforms=(ColumnOrders(orders),))
    needs_source = "shift" in settings.needs or variant.source_inputs
    stream = bench.embed(bench.tokens.tokens)
    unseen = bench.embed(bench.tokens.held_out)
    source = stream.clone() if needs_source else None
    source_unseen = unseen.clone() if needs_source else None
    blocks: list[nn.Module] = []
    results: list[LinearResult] = []
    for i, original in enumerate(bench.blocks):
        block = copy.deepcopy(original)
        names = [linear.name for linear in bench.plan.block_linears(i)]
        if variant.source_inputs and source is not None:
            stream = source
        _, found = refine_block(
            bench.model,
            i,
            block,
            Stream(stream, source),
            {name: chosen.linears[name] for name in names},
            settings,
            held_out=Stream(unseen, source_unseen),
        )
        results += found
        blocks.append(block)
        stream = run_windows(bench.model, i, block, stream, batch=BATCH)
        if needs_source and source is not None and source_unseen is not None:
            source = run_windows(bench.model, i, original, source, batch=BATCH)
            unseen = run_windows(bench.model, i, block, unseen, batch=BATCH)
            source_unseen = run_windows(bench.model, i, original, source_unseen, batch=BATCH)
    return blocks, results


def measured(bench: Bench, blocks: list[nn.Module]) -> dict[str, dict[str, float]]:
    """Perplexity, KL and agreement on every text."""
    result = {}
    for name, tokens in bench.texts.items():
        quality = perplexity_and_kl(
            Windows(bench.model, bench.reference[name]),
            Windows(bench.model, bench.run(blocks, tokens)),
            tokens,
        ).candidate()
        result[name] = {
            "perplexity": quality.perplexity,
            "perplexity_se": quality.perplexity_se,
            "kl": quality.kl,
            "kl_se": quality.kl_se,
            "top1_agreement": quality.top1_agreement,
        }
    return result


def row(bench: Bench, variant: Variant) -> dict[str, Any]:
    """Everything recorded of one variant."""
    started = time.perf_counter()
    bench.prepare(variant)
    chosen, predicted = allocation(bench, variant)
    allocated = time.perf_counter()
    bench.model.fast = bench.tf32
    blocks, results = refined(bench, variant, chosen)
    bench.model.fast = False
    finished = time.perf_counter()
    spent = footprint(bench.plan, chosen)
    return {
        "name": variant.name,
        "code_bits": spent.code_bits,
        "true_bits": spent.bits,
        "bytes": spent.size,
        "predicted_loss": predicted,
        "texts": measured(bench, blocks),
        "seconds": {
            "allocate": round(allocated - started, 1),
            "refine": round(finished - allocated, 1),
            "evaluate": round(time.perf_counter() - finished, 1),
        },
        "errors": errors_by_kind(results),
        "asymmetric_kept": sum(bool(result.asymmetric) for result in results),
        "widths": widths_histogram(chosen),
    }


def errors_by_kind(results: list[LinearResult]) -> dict[str, float]:
    """Mean relative error per kind of linear, as stored."""
    kinds: dict[str, list[float]] = {}
    for result in results:
        kinds.setdefault(result.name.rpartition(".")[2], []).append(result.relative_error)
    return {kind: round(sum(errors) / len(errors), 6) for kind, errors in kinds.items()}


def widths_histogram(chosen: BitWidthMap) -> dict[str, int]:
    """Number of groups per width."""
    flat = [width for widths in chosen.linears.values() for width in widths]
    return {str(width): flat.count(width) for width in sorted(set(flat))}


def markdown(state: Mapping[str, Any]) -> str:
    """The table of a results file."""
    lines = [
        f"{state['windows']} Command: `{state['command']}`.",
        "",
        f"Machine: {state['machine']}.",
        "",
        "| variant | code bits | true bits | wiki perplexity | KL | handbook perplexity | KL "
        "| profile s | refine s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in state["rows"].items():
        wiki, handbook = (entry["texts"][text] for text in TEXTS)
        lines.append(
            f"| {name} | {entry['code_bits']:.3f} | {entry['true_bits']:.3f} "
            f"| {wiki['perplexity']:.2f} ± {wiki['perplexity_se']:.2f} | {wiki['kl']:.4f} "
            f"| {handbook['perplexity']:.2f} ± {handbook['perplexity_se']:.2f} "
            f"| {handbook['kl']:.4f} "
            f"| {entry['seconds']['allocate']:.0f} | {entry['seconds']['refine']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def source_row(bench: Bench) -> dict[str, Any]:
    """The source model itself."""
    return {
        "name": "source",
        "code_bits": 32.0,
        "true_bits": 32.0,
        "texts": measured(bench, bench.blocks),
        "seconds": {"allocate": 0, "refine": 0},
    }


def machine(device: torch.device) -> str:
    """Device, processor and versions."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = torch.get_num_threads()
    return f"{chip}, {threads} CPU threads, torch {torch.__version__}, Python " + (
        platform.python_version()
    )


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--out", type=Path, default=Path("build/quality/rows"))
    parser.add_argument("--variants", nargs="*", default=["*"], help="names or patterns")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no row after this long")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--tf32", action="store_true", help="TF32 in calibration's block runs")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    known = list(variants())
    wanted = dict.fromkeys(v for p in options.variants for v in known if fnmatch(v.name, p))
    if options.list or options.source is None:
        print("\n".join(v.name for v in wanted))
        return
    started = time.perf_counter()
    device = torch.device(options.device)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    store = options.out.with_suffix(".json")
    bench = Bench(options.source, options)
    state = json.loads(store.read_text()) if store.exists() else {"rows": {}}
    state |= {
        "machine": machine(device),
        "command": " ".join(["python", *sys.argv]),
        "windows": f"Calibration {tuple(bench.tokens.tokens.shape)} tokens, evaluation "
        + ", ".join(f"{name} {tuple(text.shape)}" for name, text in bench.texts.items())
        + ".",
    }
    print(f"loaded in {time.perf_counter() - started:.0f} s", flush=True)
    for variant in [None, *wanted]:
        name = variant.name if variant else "source"
        if name in state["rows"] or time.perf_counter() - started > options.seconds:
            continue
        entry = row(bench, variant) if variant else source_row(bench)
        state["rows"][name] = entry
        store.write_text(json.dumps(state, indent=1))
        options.out.with_suffix(".md").write_text(markdown(state))
        figures = {text: round(entry["texts"][text]["perplexity"], 3) for text in TEXTS}
        print(name, round(entry["code_bits"], 4), figures, entry["seconds"], flush=True)


if __name__ == "__main__":
    main()
