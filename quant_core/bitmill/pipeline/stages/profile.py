"""Stage `profile`: what every width costs every group, and the column orders."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bitmill.allocation.allocator import Allocator
from bitmill.allocation.profile import (
    PROFILE_NAME,
    ProfileConfig,
    ProfileOrigin,
    SensitivityProfile,
)
from bitmill.calibration.kept_weights import KeptWeights
from bitmill.config.codes import CODES
from bitmill.config.quantization import QuantizationConfig
from bitmill.models.dtypes import compute_dtype
from bitmill.pipeline.source import Model, Source
from bitmill.pipeline.stage import Environment, Run, Stage
from bitmill.plan.model_plan import Plan
from bitmill.sensitivity.measure import make_profile


@dataclass(frozen=True)
class Inputs:
    """windows: int64 [S, T]. known: a stored profile of this origin, or None.

    origin: names model and calibration by all of their files and windows, and is no input. weights:
    where those of the tokens are left for refinement, which it would find itself.
    """

    model: Model
    plan: Plan
    windows: Tensor
    config: ProfileConfig
    environment: Environment
    origin: ProfileOrigin = field(compare=False)
    known: Path | None = field(compare=False)
    weights: KeptWeights | None = field(compare=False)

    @classmethod
    def of(
        cls,
        source: Source,
        plan: Plan,
        windows: Tensor,
        origin: ProfileOrigin,
        environment: Environment,
        store: Path | None,
        weights: KeptWeights | None = None,
    ) -> Inputs:
        """store: folder of profiles by id, shared between jobs, or None."""
        forward = origin.config.kind != "knapsack" and not plan.embeddings
        model = source.without_head(plan) if forward else source.planned(plan)
        known = store / origin.key / PROFILE_NAME if store else None
        return cls(model, plan, windows, origin.config, environment, origin, known, weights)


def work(inputs: Inputs, run: Run, folder: Path) -> None:
    """Takes the stored profile where there is one, which must be what its place says."""
    known = inputs.known if inputs.known is not None and inputs.known.is_file() else None
    if known is not None and SensitivityProfile.load(known).key != inputs.origin.key:
        run.warn(
            f"the profile stored as {known.parent.name} was made from another model or other "
            "settings and is measured anew: remove that folder"
        )
        known = None
    if run.group.broadcast(known is not None):
        if known is not None and run.group.first:
            shutil.copyfile(known, folder / PROFILE_NAME)
        return
    made = make_profile(
        run.open_model(inputs.model.folder, inputs.plan),
        inputs.windows,
        inputs.plan,
        inputs.origin,
        folder=folder,
        on_unit=run.on_unit,
        group=run.group,
        weights=inputs.weights,
    )
    if run.group.first:
        made.save(folder / PROFILE_NAME)


STAGE = Stage("profile", work, shared=True, travels=True)


def load(folder: Path, origin: ProfileOrigin) -> SensitivityProfile:
    """What the stage made, under the id that it would have if it were made now."""
    return SensitivityProfile.load(folder / PROFILE_NAME).of(origin)


def needed(
    config: QuantizationConfig, plan: Plan, environment: Environment
) -> ProfileConfig | None:
    """What the profile must hold, or None where none is needed."""
    allocation = config.allocation
    resumed = config.method.resumed is not None
    if allocation.method in ("uniform", "map") and (allocation.order == "natural" or resumed):
        return None
    knapsack, sba = allocation.method == "knapsack", allocation.method == "sba"
    return ProfileConfig(
        kind="knapsack" if knapsack else "sba" if sba else "orders",
        order=allocation.order,
        keep=allocation.keep,
        embeddings=tuple(matrix.name for matrix in plan.embeddings) or None,
        widths=_widths(config) if knapsack else None,
        code=config.code_name if (knapsack or sba) and config.code_name != "affine" else None,
        moments="weighted" if knapsack else None,
        outliers=allocation.outliers or None,
        base=Allocator(plan, allocation).sba_base(config.budget) if sba else None,
        sequences=config.calibration.profile_sequences,
        dtype=str(compute_dtype(torch.device(environment.device), plan)),
        seed=config.seed,
        threads=environment.threads,
        device=environment.device,
        devices=environment.devices,
        torch=environment.torch_version,
    )


def _widths(config: QuantizationConfig) -> tuple[int, ...]:
    """Those of the code, so that one profile serves many jobs, and that of dropped groups where it
    is asked for."""
    return tuple(sorted({*CODES[config.code_name].widths, *config.allocation.legal_widths}))
