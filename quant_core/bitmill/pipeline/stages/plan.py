"""Stage `plan`: the job's plan held against all weights and libraries, before work begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitmill.config.quantization import QuantizationConfig
from bitmill.evaluation.tasks import TaskSuite
from bitmill.io.atomic import sha256_file, write_bytes
from bitmill.models.reader import CheckpointSource, finite
from bitmill.models.scale_range import ScaleRange
from bitmill.models.skeleton import check_generation, check_skeleton
from bitmill.pipeline.source import Model
from bitmill.pipeline.stage import Run, Stage
from bitmill.plan.config_json import read_config
from bitmill.plan.model_plan import (
    PLAN_NAME,
    Plan,
    PlannedTensor,
    length_notes,
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
    """plan: as the job was admitted with. lengths: tokens of calibration, evaluation windows.

    widths: that linears may get.
    """

    model: Model
    plan: Plan
    lengths: tuple[int, int]
    widths: tuple[int, ...]
    tasks: Tasks

    @classmethod
    def of(
        cls, model: Model, plan: Plan, config: QuantizationConfig, task_folder: Path | None
    ) -> Inputs:
        """What of a job decides whether it can be done as planned."""
        lengths = (config.calibration.length, config.evaluation.length)
        tasks = Tasks.of(config.evaluation.tasks, task_folder)
        return cls(model, plan, lengths, config.allocation.legal_widths, tasks)


def work(inputs: Inputs, run: Run, folder: Path) -> None:
    """Raises for impossible tasks, for weights with NaN or infinity or beyond what scales hold, and
    for configurations of which transformers builds another model than is planned."""
    check_skeleton(read_config(inputs.model.folder)[0])
    check_generation(inputs.model.folder)
    inputs.tasks.suite()
    scales = ScaleRange.of((*inputs.plan.linears, *inputs.plan.embeddings), inputs.widths)
    with CheckpointSource(inputs.model.folder) as tensors:
        for name, tensor in finite(tensors, inputs.plan.stored):
            scales.look(name, tensor)
        narrowed = [tensor for tensor in inputs.plan.tensors if tensor.narrowed]
        planned = _widened(inputs.plan, [t for t in narrowed if not tensors.can_narrow(t)])
    lengths = length_notes(inputs.plan, *inputs.lengths)
    for note in (*inputs.plan.notes, *lengths, *scales.notes()):
        run.warn(note)
    write_bytes(folder / PLAN_NAME, planned.model_dump_json(indent=1).encode())


STAGE = Stage("plan", work)


def _widened(plan: Plan, wide: Sequence[PlannedTensor]) -> Plan:
    """The plan with these kept tensors in the source's dtype after all."""
    if not wide:
        return plan
    names = {tensor.name for tensor in wide}
    tensors = tuple(
        tensor.model_copy(update={"narrowed": False}) if tensor.name in names else tensor
        for tensor in plan.tensors
    )
    return plan.model_copy(update={"tensors": tensors})


def load(folder: Path) -> Plan:
    """What the stage made."""
    return Plan.model_validate_json((folder / PLAN_NAME).read_bytes())
