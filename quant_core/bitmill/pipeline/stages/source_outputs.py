"""Stage `evaluate`, its part that jobs of a sweep share: the source model's own outputs.

What the last block puts out for the windows of every evaluation text, [S, T, D] in the dtype that
is computed in; each rank keeps those of its own windows. A job by itself makes them on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmill.evaluation.count import Count
from bitmill.evaluation.logits import StreamedLogits
from bitmill.pipeline.source import Model
from bitmill.pipeline.stage import Environment, Run, Stage
from bitmill.plan.model_plan import Plan
from bitmill.runtime.ranks import Ranks


@dataclass(frozen=True)
class Inputs:
    """windows: int64 [S, T] of every evaluation text."""

    model: Model
    plan: Plan
    windows: Mapping[str, Tensor]
    environment: Environment


def work(inputs: Inputs, run: Run, folder: Path) -> None:
    """Every rank writes a file."""
    model = run.open_model(inputs.model.folder, inputs.plan)
    outputs, own = {}, {text: run.group.shard(all_) for text, all_ in inputs.windows.items()}
    count = Count(run.on_unit, sum(len(windows) for windows in own.values()))
    for text, windows in own.items():
        on_block = count.part(len(windows), f"source on {text}")
        outputs[text] = StreamedLogits(model, on_block=on_block).last_block(windows)
    save_file(outputs, _file(folder, run.group))


STAGE = Stage("evaluate", work, shared=True)


def load(folder: Path, group: Ranks) -> dict[str, Tensor]:
    """What this rank wrote."""
    return load_file(_file(folder, group))


def _file(folder: Path, group: Ranks) -> Path:
    return folder / f"outputs-{group.rank}.safetensors"
