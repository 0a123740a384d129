"""Stage `plan`: linears, kept tensors and sizes; refuses what cannot end well before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bitmill.allocation.allocator import check_budget
from bitmill.config.quantization import Allocation, Budget, QuantizationConfig
from bitmill.config.transforms import TransformConfig
from bitmill.evaluation.tasks import TaskSuite
from bitmill.io.atomic import sha256_file, write_bytes
from bitmill.models.reader import CheckpointSource, check_all_finite
from bitmill.models.skeleton import check_skeleton
from bitmill.pipeline.source import Model
from bitmill.pipeline.stage import Run, Stage
from bitmill.plan.config_json import read_config
from bitmill.plan.model_plan import (
    PLAN_NAME,
    Plan,
    check_lengths,
    check_rows,
    length_notes,
    make_plan,
)


@dataclass(frozen=True)
class Tasks:
    """lm-evaluation-harness tasks by name, and the files of a folder of one's own."""

    names: tuple[str, ...]
    folder: Path | None = field(compare=False)
    files: Mapping[str, str]

    @classmethod
    def of(cls, names: tuple[str, ...], folder: Path | None) -> Tasks:
        """The tasks asked for, with what lies in the folder now."""
        found = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
        files = {str(path.relative_to(folder)): sha256_file(path) for path in found if folder}
        return cls(names, folder, files if names else {})

    def suite(self) -> TaskSuite | None:
        """The suite, None without tasks; raises `SpecError` for a task that there is not."""
        return TaskSuite(self.names, self.folder) if self.names else None


@dataclass(frozen=True)
class Inputs:
    """lengths: tokens of calibration and evaluation windows.

    admitted: the plan that `admit` made of the same folder, None where it made none.
    """

    model: Model
    allocation: Allocation
    budget: Budget
    transforms: tuple[TransformConfig, ...]
    format: str
    calibration_length: int
    evaluation_length: int
    devices: int
    tasks: Tasks
    admitted: Plan | None = field(compare=False)

    @classmethod
    def of(
        cls,
        model: Model,
        config: QuantizationConfig,
        task_folder: Path | None,
        admitted: Plan | None,
    ) -> Inputs:
        """What of a configuration decides what there is to do."""
        return cls(
            model=model,
            allocation=config.allocation,
            budget=config.budget,
            transforms=config.transforms,
            format=config.format,
            calibration_length=config.calibration.length,
            evaluation_length=config.evaluation.length,
            devices=config.devices,
            tasks=Tasks.of(config.evaluation.tasks, task_folder),
            admitted=admitted,
        )


def work(inputs: Inputs, run: Run, folder: Path) -> None:
    """Raises for impossible budgets, windows and tasks, for weights with NaN or infinity, and for
    configurations of which transformers builds another model than is planned."""
    made = inputs.admitted or _admitted(inputs)
    check_skeleton(read_config(inputs.model.folder)[0])
    inputs.tasks.suite()
    with CheckpointSource(inputs.model.folder) as tensors:
        check_all_finite(tensors, made.stored)
    lengths = length_notes(made, inputs.calibration_length, inputs.evaluation_length)
    for note in (*made.notes, *lengths):
        run.warn(note)
    write_bytes(folder / PLAN_NAME, made.model_dump_json(indent=1).encode())


STAGE = Stage("plan", work)


def _admitted(inputs: Inputs) -> Plan:
    asked = QuantizationConfig(allocation=inputs.allocation, budget=inputs.budget)
    made = make_plan(inputs.model.folder, asked).stored_as(inputs.format, inputs.transforms)
    check_budget(made, asked)
    check_lengths(made, inputs.calibration_length, inputs.evaluation_length)
    check_rows(made, inputs.devices)
    return made


def load(folder: Path) -> Plan:
    """What the stage made."""
    return Plan.model_validate_json((folder / PLAN_NAME).read_bytes())
