"""Stage `pack`: the packed folder, without its quality report and manifest."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.formats.codec import Supply, codec_of
from bitmill.formats.format import Contents, format_of
from bitmill.formats.writing import source_settings
from bitmill.io.atomic import write_json
from bitmill.models.reader import CheckpointSource
from bitmill.pipeline.source import Model, Source
from bitmill.pipeline.stage import Run, Stage
from bitmill.pipeline.stages.refine import Refined
from bitmill.plan.model_plan import Plan
from bitmill.transforms.column_order import FoldedOrders

PACKED_NAME = "packed"
HASHES_NAME = "tensor_hashes.json"


@dataclass(frozen=True)
class Inputs:
    """model: the tensors that are taken over as they are. companions: tokenizer, licence, ..."""

    model: Model
    companions: Mapping[str, str]
    plan: Plan
    bit_widths: BitWidthMap
    refined: Refined

    @classmethod
    def of(cls, source: Source, plan: Plan, bit_widths: BitWidthMap, refined: Refined) -> Inputs:
        """What of a job decides the packed folder."""
        return cls(source.kept(plan), source.companions, plan, bit_widths, refined)


def work(inputs: Inputs, run: Run, folder: Path) -> None:
    """Folds column orders where that is exact."""
    plan, widths = inputs.plan, inputs.bit_widths
    kept = {tensor.name: tensor for tensor in plan.tensors}
    refined = inputs.refined.open(plan)
    changed = refined.changed
    done = 0

    def on_linear(_: str) -> None:
        nonlocal done
        done += 1
        run.on_unit(done, len(plan.shapes), "linear")

    def other(name: str) -> Tensor:
        found = changed.get(kept[name].module)
        return stored.tensor(kept[name]) if found is None else found

    packed = folder / PACKED_NAME
    shutil.rmtree(packed, ignore_errors=True)
    packed.mkdir()
    with CheckpointSource(inputs.model.folder) as stored:
        supply = Supply(
            folder=inputs.model.folder,
            settings=source_settings(inputs.model.folder),
            linear=FoldedOrders(refined, plan).packed,
            other=other,
        )
        contents = Contents.of(plan, widths)
        hashes = codec_of(format_of(plan)).write(packed, contents, supply, on_linear)
    write_json(folder / HASHES_NAME, hashes)


STAGE = Stage("pack", work)
