"""Stage `refine` without training: the packed linears of an earlier job, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.errors import FormatError
from bitmill.formats.codec import open_checkpoint
from bitmill.io.atomic import write_json
from bitmill.pipeline.learned_parameters import PARAM, LearnedParameters
from bitmill.pipeline.stage import Run, Stage
from bitmill.plan.model_plan import Plan, PlannedLinear
from bitmill.refinement.model import TUNING_NAME
from bitmill.refinement.store import EMBEDDINGS, save_block
from bitmill.results import QUALITY_NAME, QualityReport


@dataclass(frozen=True)
class Inputs:
    """learned: what an earlier job published; its manifest stands for all of its files."""

    learned: LearnedParameters
    plan: Plan
    bit_widths: BitWidthMap


def work(inputs: Inputs, run: Run, folder: Path) -> None:
    """Raises `InputError` for another map than the one that was learned for."""
    inputs.learned.check_map(inputs.bit_widths)
    take_over(inputs.learned, inputs.plan, folder, run.on_unit)


STAGE = Stage("refine", work)


def take_over(
    learned: LearnedParameters,
    plan: Plan,
    folder: Path,
    on_unit: Callable[[int, int, str, str], None],
) -> None:
    """Fill the folder of `RefinedModel` with learned parameters and what was reported of them.

    on_unit: told blocks done, their number, the unit and a message. Raises FormatError where the
    files are damaged or belong to another model.
    """
    learned.check_files()
    checkpoint = open_checkpoint(learned.folder)
    checkpoint.check_linears(plan.shapes)
    report = QualityReport.load(learned.folder / QUALITY_NAME)
    linears = {linear.name: linear for linear in report.linears}
    blocks = {block.index: block for block in report.blocks}
    if (
        plan.by_name.keys() - linears.keys()
        or {linear.block for linear in plan.linears} - blocks.keys()
    ):
        raise FormatError(
            f"quality.json of {learned.folder.name} does not report on every block and linear",
            param=PARAM,
        )

    def take(i: int, part: Sequence[PlannedLinear], details: dict[str, Any] | None) -> None:
        weights = {linear.name: checkpoint.linear(linear.shape).unpack() for linear in part}
        save_block(folder, i, weights, [linears[linear.name] for linear in part], details)

    if plan.embeddings:
        take(EMBEDDINGS, plan.embeddings, None)
    for i in range(plan.block_count):
        learned_of = blocks[i].model_dump(mode="json") if i in blocks else None
        take(i, plan.block_linears(i), learned_of)
        on_unit(i + 1, plan.block_count, "block", "learned earlier")
    if report.tuning is not None:
        write_json(folder / TUNING_NAME, report.tuning.model_dump(mode="json"))
