"""Refinement method "omniquant": what is learned in each mode, how long, and how it is kept.

| mode       | learned                                 | starts from       | published as         |
|------------|-----------------------------------------|-------------------|----------------------|
| `clipping` | two clipping factors per row and group  | min-max range     | OmniQuant, SliM-LLM+ |
| `scales`   | scales, zero points                     | quantized weights | EfficientQAT's s, z  |
| `rounding` | scales, zero points, unrounded weights  | quantized weights | EfficientQAT's s,z,W |

`clipping.py` and `rounding.py` hold the equations, `block.py` the loop
over one block, `metric.py` the error it lowers, `end_to_end.py` the end-to-end step.

Defaults of `clipping` are the published ones (OmniQuant's 3-bit script: 20 epochs, one sequence a
step, Adam at 1e-2, no schedule, plain error; `augmented_loss` as SliM-LLM+ sets it). The other
modes take larger batches and a decaying rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bitmill.config.methods import OmniQuant
from bitmill.quant.tensors import QuantizedWeight
from bitmill.refinement.omniquant.adam import DescentSettings, Rate
from bitmill.refinement.omniquant.clipping import LearnedClipping
from bitmill.refinement.omniquant.rounding import LearnedRounding
from bitmill.refinement.omniquant.rows import BlockRows
from bitmill.solvers.solver import Solver, solver_of

Mode = Literal["clipping", "scales", "rounding"]
Learner = LearnedClipping | LearnedRounding

EVALUATIONS = 12
"""Held-out losses per block, besides the one before the first step."""


@dataclass(frozen=True)
class LearningSettings:
    """How a block is learned.

    epochs, batch:   passes over the calibration sequences, sequences per step
    scale_rate:      per step, relative to each scale
    position_rate:   per step, in codes (zero points too)
    clipping_rate:   per step, before the sigmoid
    augmented_loss:  also match the float block run on the quantized prefix's outputs
    block_error:     "plain", or "fisher" weighted by the loss gradient (`metric.py`)
    shrink:          share of plain error in the fisher one
    cosine:          rates decay to 0, else they stay
    record:          replay steps from a CUDA graph where that is possible
    """

    mode: Mode = "rounding"
    epochs: int = 12
    batch: int = 4
    scale_rate: float = 2e-3
    position_rate: float = 1e-2
    clipping_rate: float = 1e-2
    augmented_loss: bool = False
    block_error: Literal["plain", "fisher"] = "fisher"
    shrink: float = 0.3
    cosine: bool = True
    record: bool = True

    @classmethod
    def of_mode(cls, mode: Mode) -> LearningSettings:
        """The defaults of a mode."""
        if mode == "clipping":
            return cls(mode, epochs=20, batch=1, block_error="plain", cosine=False)
        if mode == "scales":
            return cls(mode, position_rate=5e-3)
        return cls(mode)

    @classmethod
    def of_spec(cls, spec: OmniQuant) -> LearningSettings:
        """The settings of a job; what the job leaves open takes its mode's default."""
        settings = cls.of_mode(spec.mode)
        return replace(
            settings,
            epochs=settings.epochs if spec.epochs is None else spec.epochs,
            batch=settings.batch if spec.batch is None else spec.batch,
            augmented_loss=spec.augmented_loss,
        )

    def descent(self, sequences: int) -> DescentSettings:
        """Steps and held-out checks for a number of calibration sequences."""
        steps = self.epochs * -(-sequences // self.batch)
        every = max(1, steps // EVALUATIONS)
        return DescentSettings(
            steps, every, warmup=steps // 20 if self.cosine else 0, cosine=self.cosine
        )


def first_solver(settings: OmniQuant) -> Solver:
    """What gives every block its first solution."""
    return solver_of(settings.first)


def make_learner(
    settings: LearningSettings,
    starts: Mapping[str, QuantizedWeight],
    weights: Mapping[str, Tensor],
    device: torch.device,
) -> Learner:
    """The parameters of one block: `starts` give widths and orders, and the start but in clipping.

    weights: full name -> float weight [N, K] in source column order.
    """
    rows = BlockRows(starts, device)
    if settings.mode == "clipping":
        return LearnedClipping(rows, weights)
    return LearnedRounding(rows, starts, weights, roundings=settings.mode == "rounding")


def learning_rates(learner: Learner, settings: LearningSettings) -> list[Rate]:
    """Which parameters move, and how fast."""
    if isinstance(learner, LearnedClipping):
        return [Rate([learner.upper, learner.lower], settings.clipping_rate)]
    rates = [
        Rate([learner.ratio], settings.scale_rate),
        Rate([learner.zero], settings.position_rate),
    ]
    if learner.position.requires_grad:
        rates.append(Rate([learner.position], settings.position_rate))
    return rates
