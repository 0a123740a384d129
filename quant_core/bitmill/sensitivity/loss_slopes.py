"""How the real loss answers to each linear's quantization error, at a quantized model.

    slope_l = d/da  L(W_l + a D_l, all other linears quantized)  at a = 1,   D_l = Wq_l - W_l
            = 1/P sum_t g_t^T D_l x_t

L is KL(source || quantized), or the loss on the text, in nats per token; one backward pass through
the quantized model gives the slope of every linear. Were L the sum of the profile's costs c_l, each
quadratic in D_l, the slope would be 2 c_l. The ratio of the two corrects the profile for what its
costs leave out: that errors of different linears add up or cancel, and that large errors saturate
(sensitivity at a quantized reference point, after arXiv 2602.17698).

    corrected costs of linear l = costs * (slope_l / 2 c_l)

Given up: a correction per group. GPTQ moves a group's error into later groups, so only the whole
linear's slope has a meaning of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitmill.allocation.profile import SensitivityProfile
from bitmill.calibration.gradients import GradientPass, PassSettings, Prepare
from bitmill.models.streamed import StreamedModel, weight_of

KL_PASS = PassSettings(labels="source")
LARGEST_CORRECTION = 4.0


class _WeightGradients:
    """Sums g^T x of every linear of a block: f32 [N, K] each."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def seen(self, name: str, x: Tensor, gradient: Tensor) -> None:
        if name not in self.sums:
            shape = (gradient.shape[1], x.shape[1])
            self.sums[name] = torch.zeros(shape, device=x.device)
        self.sums[name].addmm_(gradient.float().T, x.float())


def loss_slopes(
    model: StreamedModel,
    tokens: Tensor,
    quantize: Prepare,
    settings: PassSettings = KL_PASS,
    *,
    scratch: Path | None = None,
) -> dict[str, float]:
    """Slope of every linear, nats per token, on windows of tokens int64 [S, T].

    quantize(i, block): writes the quantized weights into block i.
    """
    run = GradientPass(model, tokens, settings, scratch=scratch, prepare=quantize)
    watched: dict[int, _WeightGradients] = {}
    slopes: dict[str, float] = {}

    def observer(i: int) -> _WeightGradients:
        watched[i] = _WeightGradients()
        return watched[i]

    @torch.no_grad()
    def done(i: int, _: Tensor) -> None:
        source = model.linears(model.load_block(i), i)
        block = model.load_block(i)
        quantize(i, block)
        for name, module in model.linears(block, i).items():
            change = weight_of(module).float() - weight_of(source[name]).float()
            gradient = watched[i].sums.get(name, torch.zeros_like(change))
            product = (gradient * change).sum(dtype=torch.float64)
            slopes[name] = float(product) / run.predictions
        del watched[i]

    run.run(observer, on_block=done)
    return slopes


def corrected(
    profile: SensitivityProfile,
    widths: Mapping[str, Sequence[int]],
    slopes: Mapping[str, float],
    *,
    strength: float = 1.0,
) -> SensitivityProfile:
    """The profile with each linear's costs multiplied by (slope / 2 cost) ** strength.

    widths: the map at which the slopes were measured. Factors are taken relative to their median
    and held within a factor of `LARGEST_CORRECTION` of it, so noise cannot free a linear.
    """
    ratios = {
        name: max(slopes[name], 0.0) / max(2 * profile.predicted_loss({name: chosen}), 1e-30)
        for name, chosen in widths.items()
    }
    middle = float(np.median(list(ratios.values())))
    factors = {
        name: middle * float(np.clip(ratio / middle, 1 / LARGEST_CORRECTION, LARGEST_CORRECTION))
        for name, ratio in ratios.items()
    }
    linears = tuple(
        replace(linear, costs=linear.costs * factors.get(linear.name, middle) ** strength)
        for linear in profile.linears
    )
    settings = dict(profile.settings) | {"corrected_at": {n: list(w) for n, w in widths.items()}}
    return replace(profile, linears=linears, settings=settings)
