"""Stage `evaluate`: perplexity and KL of the packed folder against the source, and of baselines."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from bitmill.allocation.profile import SensitivityProfile
from bitmill.allocation.unspent import unspent_warning
from bitmill.calibration.framing import described
from bitmill.calibration.windows import CalibrationSet
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.codes import CODES
from bitmill.config.methods import BASELINE, MethodConfig
from bitmill.config.quantization import QuantizationConfig
from bitmill.config.rounded import Rounded
from bitmill.evaluation.compare import (
    Candidate,
    from_packed,
    measure,
    measure_tasks,
    observes,
    rounded_packed,
    with_weights,
)
from bitmill.evaluation.count import Count, windows_read
from bitmill.formats.accounting import footprint
from bitmill.io.atomic import write_bytes
from bitmill.models.streamed import StreamedModel
from bitmill.models.tokenizer import shared_tokenizer
from bitmill.pipeline.source import Model, Source
from bitmill.pipeline.stage import Environment, Run, Stage
from bitmill.pipeline.stages import source_outputs
from bitmill.pipeline.stages.allocate import Allocated
from bitmill.pipeline.stages.pack import PACKED_NAME
from bitmill.pipeline.stages.plan import Tasks
from bitmill.pipeline.stages.refine import Refined
from bitmill.pipeline.workspace import Made
from bitmill.plan.model_plan import Plan, length_notes, plan_source
from bitmill.plan.source_model import read_source
from bitmill.refinement.embeddings import head_squares, round_embedding
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.reporting.learning import overfitting_warnings
from bitmill.results import QUALITY_NAME, CheckedMap, QualityReport, QualityRow

EMBEDDING_WIDTH = 8


@dataclass(frozen=True)
class Baselines:
    """Uniform maps at these widths, quantized by the plain method in natural order."""

    widths: tuple[int, ...]
    method: MethodConfig
    calibration: CalibrationSet
    seed: int

    @classmethod
    def of(
        cls,
        config: QuantizationConfig,
        plan: Plan,
        calibration: CalibrationSet,
        bit_widths: BitWidthMap,
    ) -> Baselines | None:
        """The baselines asked for, each once, ascending."""
        asked = config.evaluation.refined_baselines
        if not asked:
            return None
        mean = footprint(plan, bit_widths).code_bits
        known = CODES[BASELINE.kind].widths
        legal = set(config.allocation.legal_widths) & set(known) or known
        nearest = min(legal, key=lambda b: (abs(b - mean), b))
        widths = {nearest if name == "uniform" else int(name[-1]) for name in asked}
        return cls(tuple(sorted(widths)), BASELINE, calibration, config.seed)


@dataclass(frozen=True)
class PackedEmbeddings:
    """The result with embeddings and heads packed too. plan: in which they are."""

    plan: Plan
    calibration: CalibrationSet


@dataclass(frozen=True)
class RoundedRows:
    """The result with something rounded while it runs; calibration: where a rule observes it."""

    asked: tuple[Rounded, ...]
    calibration: CalibrationSet | None

    @classmethod
    def of(cls, config: QuantizationConfig, calibration: CalibrationSet) -> RoundedRows:
        """Those asked for."""
        asked = tuple(config.evaluation.rounded.values())
        return cls(asked, calibration if any(map(observes, asked)) else None)


@dataclass(frozen=True)
class TaskRun:
    """Tasks, and what they read beside the models."""

    tasks: Tasks
    tokenizer: Mapping[str, str]
    seed: int
    chat: bool


@dataclass(frozen=True)
class Inputs:
    """method: names the row of the result. windows: int64 [S, T] of every evaluation text. begins:
    with what windows of either kind begin.

    packed: where the packed folder lies; its tensors are those of `refined` and `model`.
    outputs: of the source, where another job of the sweep may have made them (`source_outputs.py`).
    resumed: whether the refined blocks are another job's, and so what is reported of them. notes:
    what else the report warns of.
    """

    method: str
    model: Model
    plan: Plan
    bit_widths: BitWidthMap
    packed: Path = field(compare=False)
    refined: Refined
    windows: Mapping[str, Tensor]
    outputs: Path | None = field(compare=False)
    profile: SensitivityProfile | None
    baselines: Baselines | None
    embeddings: PackedEmbeddings | None
    rounded: RoundedRows
    begins: Mapping[str, str]
    checks: tuple[CheckedMap, ...]
    tasks: TaskRun | None
    resumed: bool
    notes: tuple[str, ...]
    environment: Environment

    @classmethod
    def of(
        cls,
        config: QuantizationConfig,
        source: Source,
        plan: Plan,
        calibration: CalibrationSet,
        profile: SensitivityProfile | None,
        allocated: Allocated,
        packed: Made,
        refined: Refined,
        environment: Environment,
        task_folder: Path | None,
        notes: Sequence[str],
        windows: Mapping[str, Tensor],
        outputs: Path | None,
    ) -> Inputs:
        """What of a job decides the report. notes: what it warns of beside what is found here."""
        tasks = Tasks.of(config.evaluation.tasks, task_folder)
        chat = config.evaluation.framing == "chat"
        tokenizer = shared_tokenizer(source.folder)
        return cls(
            method=f"{config.allocation.method} {config.method.name}",
            model=source.planned(plan),
            plan=plan,
            bit_widths=allocated.bit_widths,
            packed=packed.folder / PACKED_NAME,
            refined=refined,
            windows=windows,
            outputs=outputs,
            profile=allocated.corrected(profile),
            baselines=Baselines.of(config, plan, calibration, allocated.bit_widths),
            embeddings=(
                PackedEmbeddings(
                    plan_source(read_source(source.folder), config.packs_embeddings), calibration
                )
                if "embeddings" in config.evaluation.baselines
                else None
            ),
            rounded=RoundedRows.of(config, calibration),
            checks=allocated.checks,
            begins={
                "calibration": described(tokenizer, calibration.framing),
                "evaluation": described(tokenizer, config.evaluation.framing),
            },
            tasks=TaskRun(tasks, source.companions, config.seed, chat) if tasks.names else None,
            resumed=config.method.resumed is not None,
            notes=(*_notes(config, plan, allocated), *notes),
            environment=environment,
        )


def work(inputs: Inputs, run: Run, folder: Path) -> None:
    """The first rank writes the report."""
    model = run.open_model(inputs.model.folder, inputs.plan)
    count = _count(inputs, model, run)
    predicted = predicted_loss(inputs.profile, inputs.bit_widths)
    packed = from_packed(model, inputs.packed)
    candidates = {inputs.method: Candidate(inputs.bit_widths, packed, inputs.plan, predicted)}
    if inputs.embeddings is not None:
        name = f"{inputs.method}, {EMBEDDING_WIDTH}-bit embeddings"
        candidates[name] = _with_packed_embeddings(inputs, inputs.embeddings, model)
    observed = inputs.rounded.calibration
    for asked in inputs.rounded.asked:
        tokens = None if observed is None else observed.tokens
        logits = rounded_packed(model, inputs.packed, asked, tokens)
        candidate = Candidate(inputs.bit_widths, logits, inputs.plan)
        candidates[f"{inputs.method}, {asked}"] = candidate
    if inputs.baselines is not None:
        for width in inputs.baselines.widths:
            baseline = _baseline(inputs, model, width, folder, run, count)
            candidates[f"uniform {width}-bit {inputs.baselines.method.name}"] = baseline
    known = None if inputs.outputs is None else source_outputs.load(inputs.outputs, run.group)
    rows = measure(model, inputs.windows, candidates, count, group=run.group, known=known)
    if not run.group.first:
        return
    _write_report(inputs, _with_tasks(inputs, rows, model, run, count), run, folder)
    for baseline_folder in folder.glob("baseline-*"):
        shutil.rmtree(baseline_folder)


STAGE = Stage("evaluate", work, shared=True)


def _count(inputs: Inputs, model: StreamedModel, run: Run) -> Count:
    """One over the baselines' blocks, the windows that all models read, and the tasks."""
    widths = () if inputs.baselines is None else inputs.baselines.widths
    models = 1 + (inputs.embeddings is not None) + len(inputs.rounded.asked) + len(widths)
    windows = windows_read(inputs.windows, models + (inputs.outputs is None), run.group)
    tasks = () if inputs.tasks is None else inputs.tasks.tasks.names
    others = model.block_count * len(widths) + 2 * len(tasks)
    return Count(run.on_unit, windows + others, "step" if others else "window")


def load(folder: Path) -> QualityReport:
    """What the stage made."""
    return QualityReport.load(folder / QUALITY_NAME)


def predicted_loss(profile: SensitivityProfile | None, bit_widths: BitWidthMap) -> float | None:
    """What the profile says of a map; None where it has no costs of its widths or numbers of
    outliers."""
    if profile is None or not profile.widths:
        return None
    used = {width for widths in bit_widths.linears.values() for width in widths}
    kept = set(bit_widths.outliers.values())
    if not used <= set(profile.widths) or not kept <= set(profile.outliers):
        return None
    return profile.predicted(bit_widths)


def _notes(config: QuantizationConfig, plan: Plan, allocated: Allocated) -> tuple[str, ...]:
    lengths = length_notes(plan, config.calibration.length, config.evaluation.length)
    unspent = unspent_warning(plan, config, allocated.bit_widths)
    factor = allocated.correction
    corrected = (
        f"predicted losses are the profile's times {factor:.3g}: so much does the map's loss on "
        "held-out windows differ from the prediction"
    )
    found = (unspent, corrected if factor != 1 else None)
    return (*plan.notes, *lengths, *(note for note in found if note))


def _with_tasks(
    inputs: Inputs, rows: list[QualityRow], model: StreamedModel, run: Run, count: Count
) -> list[QualityRow]:
    suite = inputs.tasks.tasks.suite() if inputs.tasks else None
    if inputs.tasks is None or suite is None:
        return rows
    return measure_tasks(
        suite,
        rows,
        {"source": inputs.model.folder, inputs.method: inputs.packed},
        packed=inputs.method,
        device=run.device,
        dtype=model.dtype,
        seed=inputs.tasks.seed,
        chat=inputs.tasks.chat,
        count=count,
    )


def _write_report(inputs: Inputs, rows: list[QualityRow], run: Run, folder: Path) -> None:
    refined = inputs.refined.open(inputs.plan)
    linears, blocks = refined.reports()
    overfitting = overfitting_warnings(blocks, refined.tuning())
    for warning in overfitting:
        run.warn(warning)
    report = QualityReport(
        rows=tuple(rows),
        predicted_loss=predicted_loss(inputs.profile, inputs.bit_widths),
        linears=linears,
        blocks=blocks,
        tuning=refined.tuning(),
        resumed=inputs.resumed,
        begins=dict(inputs.begins),
        checks=inputs.checks,
        warnings=(*inputs.notes, *overfitting),
        seconds=run.seconds(),
    )
    write_bytes(folder / QUALITY_NAME, report.to_json().encode())


def _with_packed_embeddings(
    inputs: Inputs, asked: PackedEmbeddings, model: StreamedModel
) -> Candidate:
    """The result, its kept embeddings and heads rounded as a job would that packs them."""
    squares = head_squares(model, asked.calibration.tokens)
    widths = {m.name: (EMBEDDING_WIDTH,) * m.shape.groups for m in asked.plan.embeddings}
    rounded = {
        matrix.name: round_embedding(model, matrix, widths[matrix.name], squares)[0].dequantize()
        for matrix in asked.plan.embeddings
    }
    bit_widths = inputs.bit_widths.model_copy(
        update={"linears": {**inputs.bit_widths.linears, **widths}}
    )
    return Candidate(bit_widths, from_packed(model, inputs.packed, rounded), asked.plan)


def _baseline(
    inputs: Inputs, model: StreamedModel, width: int, scratch: Path, run: Run, count: Count
) -> Candidate:
    assert inputs.baselines is not None
    asked = inputs.baselines
    uniform = BitWidthMap.uniform(model.plan.shapes, width)
    folder = scratch / f"baseline-{width}"
    folder.mkdir(exist_ok=True)  # any rank may come first
    passed = count.part(model.block_count, f"uniform {width}-bit baseline")
    refine_model(
        model,
        RefineInputs(asked.calibration, uniform, {}),
        asked.method,
        folder,
        seed=asked.seed,
        on_unit=lambda done, total, *_: passed(done, total),
        group=run.group,
    )
    refined = RefinedModel(folder, model.plan)
    logits = with_weights(model, lambda name: refined.linear(name).dequantize())
    stored = inputs.plan.stored_as(CODES[asked.method.kind].format, ())
    same = stored.format == inputs.plan.format
    return Candidate(
        uniform, logits, stored, predicted_loss(inputs.profile, uniform) if same else None
    )
