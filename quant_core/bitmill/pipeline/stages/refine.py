"""Stage `refine`: codes, scales and zeros of every linear, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bitmill.allocation.profile import IndexArray, SensitivityProfile
from bitmill.calibration.kept_weights import KeptWeights
from bitmill.calibration.windows import CalibrationSet
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.methods import MethodConfig
from bitmill.config.quantization import QuantizationConfig
from bitmill.config.transforms import TransformConfig
from bitmill.pipeline.source import Model, Source
from bitmill.pipeline.stage import Environment, Run, Stage
from bitmill.plan.model_plan import Plan
from bitmill.refinement.kept_blocks import KeptBlocks
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.refinement.store import is_whole
from bitmill.registry import load_object


@dataclass(frozen=True)
class Refined:
    """The folder of refined blocks, and the hash of their reports, which hold all hashes."""

    folder: Path = field(compare=False)
    digest: str

    @classmethod
    def of(cls, folder: Path, plan: Plan) -> Refined:
        """What lies in the folder that the stage made."""
        return cls(folder, RefinedModel(folder, plan).digest)

    def open(self, plan: Plan) -> RefinedModel:
        """To be read from."""
        return RefinedModel(self.folder, plan)


@dataclass(frozen=True)
class Inputs:
    """orders: owner's name -> i32 [K], column order of the linears that `order_of` gives it.

    watched: windows of other texts, which learning reports on. weights: of tokens, as a profile
    left them; what refinement would find itself. kept: where blocks of these inputs may be already.
    """

    model: Model
    plan: Plan
    calibration: CalibrationSet
    bit_widths: BitWidthMap
    orders: Mapping[str, IndexArray]
    order_of: Mapping[str, str]
    method: MethodConfig
    transforms: tuple[TransformConfig, ...]
    seed: int
    watched: Mapping[str, Tensor]
    environment: Environment
    weights: KeptWeights | None = field(default=None, compare=False)
    kept: KeptBlocks | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        source: Source,
        plan: Plan,
        calibration: CalibrationSet,
        bit_widths: BitWidthMap,
        profile: SensitivityProfile | None,
        config: QuantizationConfig,
        environment: Environment,
        weights: KeptWeights | None = None,
        kept: KeptBlocks | None = None,
    ) -> Inputs:
        """What of a job decides the refined blocks."""
        ordered = profile if profile and bit_widths.order == "activation" else None
        linears = ordered.linears if ordered else ()
        method = config.method
        learner = load_object(method.learner) if method.learner else None
        whole = learner is not None or plan.embeddings or "gradient" in method.needs
        return cls(
            model=source.planned(plan) if whole else source.without_head(plan),
            plan=plan,
            calibration=calibration,
            bit_widths=bit_widths,
            orders=ordered.orders if ordered else {},
            order_of={linear.name: linear.order for linear in linears if linear.order is not None},
            method=method,
            transforms=config.transforms,
            seed=config.seed,
            watched=learner.watched(source.folder, calibration) if learner else {},
            environment=environment,
            weights=weights,
            kept=kept,
        )


def work(inputs: Inputs, run: Run, folder: Path, *, blocks: int | None = None) -> None:
    """Goes on behind the last block that a killed run saved, or takes blocks that were kept.

    blocks: end behind so many of them, and take none, see `refine_model`.
    """
    kept = inputs.kept if run.group.first and blocks is None else None
    taken = kept is not None and kept.take(STAGE.digest(inputs), folder)
    if run.group.broadcast(taken and is_whole(folder, inputs.plan)):
        count = inputs.plan.block_count
        run.on_unit(count, count, "block", "refined in the search for the map")
        return
    orders = {owner: torch.tensor(order).long() for owner, order in inputs.orders.items()}
    refine_model(
        run.open_model(inputs.model.folder, inputs.plan),
        RefineInputs(
            inputs.calibration,
            inputs.bit_widths,
            {name: orders[owner] for name, owner in inputs.order_of.items()},
        ),
        inputs.method,
        folder,
        seed=inputs.seed,
        on_unit=run.on_unit,
        transforms=inputs.transforms,
        group=run.group,
        weights=inputs.weights,
        blocks=blocks,
    )


STAGE = Stage("refine", work, version=5, shared=True)
