"""Measuring quantized models against their source: the rows of a quality report.

A candidate is a bit-width map and a streamed model that takes its dequantized weights block by
block, so a packed folder, a refinement in progress and a baseline are all measured alike and a
model larger than the accelerator's memory works. `verify` shows that a packed forward equals this.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitmill.calibration.windows import evaluation_windows
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Budget, Evaluation, Framing, QuantizationConfig, parse_part
from bitmill.config.rounded import Rounded
from bitmill.config.transforms import transform_of
from bitmill.errors import SpecError
from bitmill.evaluation.count import Count, OnUnit, windows_read
from bitmill.evaluation.logits import StreamedLogits, perplexity_and_kl
from bitmill.evaluation.origin import check_made_from, foldable
from bitmill.evaluation.rounded import NO_COLUMNS, Change, observing, rounding, rule_of
from bitmill.evaluation.tasks import TaskSuite
from bitmill.formats.accounting import footprint
from bitmill.formats.codec import open_checkpoint
from bitmill.inference.load import load
from bitmill.io.atomic import read_json
from bitmill.models.convert_gguf import convert_gguf
from bitmill.models.dtypes import compute_dtype
from bitmill.models.rewrite_source import rewrite_source
from bitmill.models.streamed import StreamedModel, set_weight
from bitmill.models.tokenizer import load_tokenizer
from bitmill.plan.config_json import CONFIG_FILE, read_config
from bitmill.plan.model_plan import Plan, plan_for_map
from bitmill.plan.source_model import recorded
from bitmill.quant.outliers import outlier_inputs
from bitmill.results import QualityRow, TextQuality
from bitmill.runtime.device import device_of
from bitmill.runtime.process import computing
from bitmill.runtime.ranks import SINGLE, Ranks


@dataclass(frozen=True)
class Candidate:
    """A map, and the model with its dequantized weights.

    plan: in whose format its bytes are counted. predicted_loss: what a profile says of the map,
    None where none covers it.
    """

    bit_widths: BitWidthMap
    logits: StreamedLogits
    plan: Plan
    predicted_loss: float | None = None


def from_packed(
    model: StreamedModel,
    packed: Path,
    matrices: Mapping[str, Tensor] | None = None,
    change: Change | None = None,
) -> StreamedLogits:
    """The model with the weights of a packed folder: with what it narrowed, and with norms and
    biases of blocks, into which transforms may have been folded.

    matrices: f32 [V, D] instead of embeddings and heads that it keeps, by name. change: see
    `with_weights`.
    """
    checkpoint = open_checkpoint(packed)

    def dequantized(name: str) -> Tensor:
        return checkpoint.weight(model.plan.by_name[name].shape)

    kept = {
        tensor.module: checkpoint.tensor(tensor.name)
        for tensor in model.plan.tensors
        if checkpoint.headers[tensor.name].dtype != tensor.dtype or foldable(model.plan, tensor)
    }
    other = {f"{name}.weight": value for name, value in (matrices or {}).items()}
    return with_weights(model, dequantized, kept | other, change)


def rounded_packed(
    model: StreamedModel, packed: Path, asked: Rounded, calibration: Tensor | None = None
) -> StreamedLogits:
    """The model of a packed folder with something rounded while it runs.

    calibration: windows i64 [S, T] that a rule observes, see `observes`. Raises `SpecError` where
    there are none for one that does.
    """
    checkpoint = open_checkpoint(packed)

    def outliers(name: str) -> Tensor:
        if name not in checkpoint.bit_widths.outliers:
            return NO_COLUMNS
        return outlier_inputs(checkpoint.linear(model.plan.by_name[name].shape).rewrites)

    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    if observes(asked):
        if calibration is None:
            raise SpecError(
                f"{asked} need calibration windows, which only a job has: ask for them in its "
                "evaluation.baselines",
                param="baselines",
            )
        from_packed(model, packed, change=observing(ranges)).last_block(calibration)
    change = rounding(asked, outliers=outliers, ranges=ranges)
    return from_packed(model, packed, change=change)


def observes(asked: Rounded) -> bool:
    """Whether calibration windows are run first."""
    return asked.rule is not None and rule_of(asked.rule).observes


def with_weights(
    model: StreamedModel,
    dequantized: Callable[[str], Tensor],
    kept: Mapping[str, Tensor] | None = None,
    change: Change | None = None,
    *,
    blocks: int | None = None,
) -> StreamedLogits:
    """The model with other weights f32 [N, K] of everything that its plan quantizes, by name.

    kept: other values of parameters that it does not quantize, by their names in the module tree.
    change: what else is done to each block. blocks: the first so many have other weights, None for
    all.
    """
    kept = kept or {}
    prefix = f"{model.plan.block_prefix}."
    count = model.block_count if blocks is None else blocks

    def replace(i: int, block: nn.Module) -> None:
        if i >= count:
            return
        for name, module in model.linears(block, i).items():
            set_weight(module, dequantized(name))
        for name, value in kept.items():
            if name.startswith(f"{prefix}{i}."):
                block.get_parameter(name.removeprefix(f"{prefix}{i}.")).copy_(value)
        if change is not None:
            change(model, i, block)

    matrices = {matrix.name: dequantized(matrix.name) for matrix in model.plan.embeddings} | {
        name.removesuffix(".weight"): value
        for name, value in kept.items()
        if not name.startswith(prefix)
    }
    return StreamedLogits(model.with_matrices(matrices), replace=replace)


@dataclass(frozen=True)
class _Pass:
    """A candidate's way through the windows of a text: its blocks, and as one more step of the same
    size the comparison, which goes window by window."""

    passed: Callable[[int, int], None]
    windows: int
    blocks: int

    def block(self, done: int, _: int) -> None:
        self.passed(done, self.blocks + 1)

    def window(self, done: int, _: int) -> None:
        self.passed(self.windows * self.blocks + done, self.windows * (self.blocks + 1))


def measure(
    model: StreamedModel,
    texts: Mapping[str, Tensor],
    candidates: Mapping[str, Candidate],
    count: Count,
    group: Ranks = SINGLE,
    known: Mapping[str, Tensor] | None = None,
) -> list[QualityRow]:
    """Rows of the source and of every candidate on every text: windows int64 [S, T] by name.

    count: has, for the windows of all texts, as many units as models read them, and is told after
    every block and every window. group: ranks that divide the windows; each gets all rows. known:
    the source's outputs of its last block [S, T, D] for this rank's windows, by text, where they
    have been computed before.
    """
    found: dict[str, dict[str, TextQuality]] = {name: {} for name in ("source", *candidates)}
    shards = {text: group.shard(windows) for text, windows in texts.items()}
    for text, windows in texts.items():
        own = shards[text]
        if known is None:
            on_block = count.part(len(own), f"source on {text}")
            reference = StreamedLogits(model, remember=True, on_block=on_block)
        else:
            reference = StreamedLogits(model, remember=True, known=(own, known[text]))
        for name, candidate in candidates.items():
            part = count.part(len(own), f"{name} on {text}")
            told = _Pass(part, len(own), model.block_count)
            measured = perplexity_and_kl(
                reference, candidate.logits.watched(told.block), own, on_window=told.window
            ).gathered(group, len(windows))
            found[name][text] = measured.candidate()
            found["source"][text] = measured.source()
    rows = [QualityRow(method="source", texts=found["source"])]
    for name, candidate in candidates.items():
        spent = footprint(candidate.plan, candidate.bit_widths)
        rows.append(
            QualityRow(
                method=name,
                code_bits=spent.code_bits,
                bits=spent.bits,
                size=spent.size,
                predicted_loss=candidate.predicted_loss,
                gap=_gap(list(found[name].values())),
                texts=found[name],
            )
        )
    return rows


def _gap(texts: Sequence[TextQuality]) -> float | None:
    if len(texts) < 2 or texts[0].loss_increase <= 0:
        return None
    return texts[-1].loss_increase / texts[0].loss_increase


def _as_packed(folder: Path, source: Path, scratch: Path) -> Path:
    """The source model of a packed folder, rewritten in `scratch` where the folder says that
    transforms of the source made it."""
    before = recorded(read_config(source)[0])
    asked = recorded(read_json(folder / CONFIG_FILE))
    if asked[: len(before)] == before:
        asked = asked[len(before) :]
    if not asked:
        return source
    rewrite_source(source, scratch, [transform_of(one) for one in asked])
    return scratch


def measure_tasks(
    suite: TaskSuite,
    rows: list[QualityRow],
    folders: Mapping[str, Path],
    *,
    packed: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    chat: bool,
    count: Count,
) -> list[QualityRow]:
    """The rows, those of `folders` (by method) with their tasks' scores; one model at a time.

    packed: the method whose folder is a packed one; the others are plain transformers folders.
    count: has one unit for each task of each folder.
    """
    scores = {}
    for method, folder in folders.items():
        if method == packed:
            model = load(folder, device=device, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True
            ).to(device)
        scores[method] = suite.measure(
            model.eval(),
            load_tokenizer(folder),
            on_task=partial(_report_task, count, method),
            seed=seed,
            chat=chat,
        )
        del model
    return [row.model_copy(update={"tasks": scores.get(row.method, {})}) for row in rows]


def _report_task(count: Count, method: str, name: str) -> None:
    count.part(1, f"{name} of {method}")(1, 1)


def evaluate_folder(
    folder: Path,
    source_folder: Path,
    *,
    gguf: str | None,
    texts: tuple[str, ...],
    sequences: int | None,
    length: int,
    device: str,
    tasks: tuple[str, ...] = (),
    task_folder: Path | None = None,
    seed: int = 0,
    on_unit: OnUnit = lambda *_: None,
    framing: Framing = "tokenizer",
    baselines: tuple[str, ...] = (),
) -> list[QualityRow]:
    """Measure a packed folder against its source model: rows for the source and the folder.

    baselines: rows of the folder with something rounded (`config/rounded.py`) too. task_folder: a
    folder of task files beside the harness's own. Raises InputError where the folder was made from
    another model, SpecError for a baseline that needs a job. Settings of the process are the
    caller's again behind it.
    """
    asked = parse_part(
        Evaluation,
        {
            "texts": texts,
            "sequences": sequences,
            "length": length,
            "tasks": tasks,
            "framing": framing,
            "baselines": baselines,
        },
    )
    others = [name for name in baselines if name not in asked.rounded]
    if others:
        raise SpecError(
            f"baselines {others} are quantized by a job: of a folder that was made before, only "
            "those with something rounded can be measured",
            param="baselines",
        )
    where = device_of(device)
    suite = TaskSuite(asked.tasks, task_folder) if asked.tasks else None
    checkpoint = open_checkpoint(folder)
    bit_widths = checkpoint.bit_widths
    with computing(), tempfile.TemporaryDirectory() as scratch:
        if gguf is not None:
            convert_gguf(source_folder / gguf, Path(scratch, "source"))
            source_folder = Path(scratch, "source")
        source_folder = _as_packed(folder, source_folder, Path(scratch, "rewritten"))
        stored_as = QuantizationConfig(budget=Budget(bits=16), format=checkpoint.format.name)
        _, planned = plan_for_map(source_folder, bit_widths, stored_as)
        model = StreamedModel(
            source_folder, planned, device=where, dtype=compute_dtype(where, planned)
        )
        check_made_from(folder, model.source, planned)
        candidates = {"packed": Candidate(bit_widths, from_packed(model, folder), planned)}
        for one in asked.rounded.values():
            logits = rounded_packed(model, folder, one)
            candidates[f"packed, {one}"] = Candidate(bit_widths, logits, planned)
        windows = evaluation_windows(asked, source_folder, rows=planned.vocab_size)
        tasks_run = 2 * len(asked.tasks)
        total = windows_read(windows, len(candidates) + 1) + tasks_run
        count = Count(on_unit, total, "step" if tasks_run else "window")
        rows = measure(model, windows, candidates, count)
        if suite is None:
            return rows
        return measure_tasks(
            suite,
            rows,
            {"source": source_folder, "packed": folder},
            packed="packed",
            device=where,
            dtype=model.dtype,
            seed=seed,
            chat=framing == "chat",
            count=count,
        )
