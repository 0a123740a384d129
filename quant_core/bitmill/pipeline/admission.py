"""Whether a job can be done at all, told from the model's config and headers. Torch-free.

The one check before any weight is read: the service asks it before a job exists (of headers that
it fetched from the Hub, where the model is there), and the run itself before its first stage. What
it plans is handed on, so that nothing is planned twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmill.allocation.allocator import check_budget
from bitmill.config.quantization import Allocation, QuantizationConfig
from bitmill.errors import ModelError, SpecError
from bitmill.formats.accounting import uniform_map
from bitmill.formats.export_plan import ExportTarget
from bitmill.formats.format import Contents, Facts, check_supported, format_of, stored_rewrites
from bitmill.pipeline.estimate import Estimate, Machine, estimate
from bitmill.plan.model_plan import (
    Plan,
    check_lengths,
    check_rows,
    plan_source,
)
from bitmill.plan.source_model import SourceModel, read_source, rewritten_source


@dataclass(frozen=True)
class Admission:
    """A job that its model, budget and settings allow.

    gguf: the source must be converted first. source: what the plan was made from, as transforms
    of the source leave it.
    """

    config: QuantizationConfig
    plan: Plan
    gguf: bool
    source: SourceModel

    @property
    def settings(self) -> dict[str, Any]:
        """Of the model's config.json, which transformers itself has still to accept
        (`models/skeleton.py`)."""
        return self.source.settings

    def needs(self, machine: Machine | None = None) -> Estimate:
        """Memory, disk and time on such a machine; a CPU by default."""
        return estimate(self.plan, self.config, machine, gguf=self.gguf)


def admit(folder: Path, config: QuantizationConfig, *, gguf: str | None = None) -> Admission:
    """Plan a job for a model folder, or for one GGUF file in it, and check what was asked.

    Raises an `InputError`: `ModelError` for the model, `BudgetError` for a budget, map or size
    that no choice of widths meets, `SpecError` for what the format cannot hold, windows longer than
    the model runs or more devices than a linear has rows.
    """
    source = rewritten_source(read_source(folder, gguf=gguf), config.source_transforms)
    plan = plan_source(source, config)
    if "embeddings" in config.evaluation.baselines:
        plan_source(source, config.packs_embeddings)
    check_format(plan, config)
    check_budget(plan, config)
    check_outliers(plan, config)
    check_baselines(config)
    check_lengths(plan, config.calibration.length, config.evaluation.length)
    check_rows(plan, config.devices)
    return Admission(config, plan, gguf is not None, source)


def check_baselines(config: QuantizationConfig) -> None:
    """Raise `SpecError` for baselines that nothing would measure."""
    asked = config.evaluation
    if asked.baselines and not asked.texts:
        raise SpecError(
            f"evaluation.baselines {[*asked.baselines]} are measured on evaluation.texts, of which "
            "there is none: name a text, or leave the baselines out",
            param="evaluation.baselines",
        )


def check_outliers(plan: Plan, config: QuantizationConfig) -> None:
    """Raise `SpecError` for numbers of outlier columns that no linear could keep beside others."""
    most = max(linear.columns for linear in plan.linears) - 1
    if vain := [count for count in config.allocation.outliers if count > most]:
        raise SpecError(
            f"allocation.outliers {vain}: the widest linear has {most + 1} columns, of which it "
            f"keeps {most} at most: leave them out",
            param="allocation.outliers",
        )


def embedding_bytes(
    admitted: Admission, widths: Sequence[int]
) -> tuple[int, dict[int, int]] | None:
    """Bytes of input embedding and output head as the result keeps them, and packed, by width.

    None where the result packs them itself or the source has no input embedding of its own.
    """
    if admitted.config.allocation.embeddings == "quantize":
        return None
    try:
        other = plan_source(admitted.source, admitted.config.packs_embeddings)
    except ModelError:
        return None
    chosen, shapes = format_of(other), [matrix.shape for matrix in other.embeddings]
    names = {f"{shape.name}.weight" for shape in shapes}
    kept = sum(tensor.spec.nbytes for tensor in admitted.plan.tensors if tensor.name in names)
    packed = {
        width: sum(
            chosen.linear_bytes(shape, (width,) * shape.groups, embedding=True) for shape in shapes
        )
        for width in widths
    }
    return kept, packed


def check_format(plan: Plan, config: QuantizationConfig) -> None:
    """Raise `SpecError` naming what of the job its format has no place for."""
    chosen = format_of(plan)
    if not chosen.keeps_codes:
        raise SpecError(
            f"format {chosen.name!r} keeps no codes, so no job can store its result in it: export "
            "the result",
            code="format_refuses",
            param="format",
        )
    check_supported(chosen, _facts(plan, config, {}))


def check_exports(admitted: Admission, targets: Sequence[ExportTarget]) -> None:
    """Raise `SpecError` naming what of the job's result a target has no place for."""
    for target in targets:
        if target.format == format_of(admitted.plan).name:
            raise SpecError(
                f"exports: the result is in format {target.format!r} itself", param="exports"
            )
        facts = _facts(admitted.plan, admitted.config, admitted.settings)
        check_supported(target.chosen, facts)


def readers(admitted: Admission, target: ExportTarget | None = None) -> list[str]:
    """Names of the runtimes that will read the job's result, or an export of it."""
    chosen = format_of(admitted.plan) if target is None else target.chosen
    facts = _facts(admitted.plan, admitted.config, admitted.settings)
    return [one.name for one in chosen.readers(facts)]


def export_bytes(admitted: Admission, target: ExportTarget, width: int) -> int:
    """Bytes of all files that hold tensors, where every group of the result has this width."""
    plan, order = admitted.plan, admitted.config.allocation.order
    widths = uniform_map(plan, width, admitted.config.allocation.legal_widths, order).linears
    return target.chosen.file_bytes(Contents(plan, widths, order, admitted.settings))


def _facts(plan: Plan, config: QuantizationConfig, settings: dict[str, Any]) -> Facts:
    """What is known of a job's result before there is one; settings: of its config.json."""
    allocation = config.allocation
    widths = allocation.legal_widths
    given = allocation.map.linears.values() if allocation.map else ()
    if given:
        widths = tuple({width for groups in given for width in groups})
    keeps = allocation.outliers or (allocation.map and allocation.map.outliers)
    return Facts(
        plan,
        kinds=frozenset({config.method.kind}),
        widths=frozenset(widths),
        mixed=any(len(set(groups)) > 1 for groups in given) or _mixes(allocation),
        rewrites=stored_rewrites(plan, allocation.order) | ({"outliers"} if keeps else set()),
        config=settings,
        grid=config.method.grid or "any",
    )


def _mixes(allocation: Allocation) -> bool:
    """Whether the allocation may give the groups of one linear different widths."""
    return allocation.method in ("sba", "knapsack") and not allocation.per_linear
