"""How much each token counts at a linear's input: the squared loss gradient at the outputs.

    a_t = mean over the linears that read one input of |g_t|^2 / mean_t |g_t|^2

To second order a change D of a linear's weights raises the loss by the sum of (g_t^T D x_t)^2 / 2,
so with H = sum_t a_t x_t x_t^T a solver answers for the loss instead of for its own outputs
(Fisher information whose rows are taken alike; arXiv 1503.05671, section 3). Tokens that excite a
linear most need not be those with large gradients: in down projections of Gemma 3 270M the plain
mean overstates costs 5 to 25 times (docs/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.calibration.gradients import GradientPass, PassSettings
from bitmill.models.streamed import StreamedModel

TINY = 1e-38


class _Energies:
    """|g|^2 of every token at the outputs of one block's linears, batch by batch."""

    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}

    def seen(self, name: str, x: Tensor, gradient: Tensor) -> None:
        norms = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float32)
        self.found.setdefault(name, []).append(norms.square().cpu())


def token_weights(
    model: StreamedModel, tokens: Tensor, settings: PassSettings | None = None
) -> dict[str, Tensor]:
    """Weights f32 [S, T], of mean 1, by the first of linears that read one input.

    tokens: int64 [S, T]; none, and no window of one token, has weights. Routed experts, which see
    some of the tokens, and linears without any gradient have none either. Raises CalibrationError
    where gradients are not finite.
    """
    if not len(tokens) or tokens.shape[1] < 2:
        return {}
    seen: dict[str, list[Tensor]] = {}

    def observer(i: int) -> _Energies:
        energies = _Energies()
        observers.append(energies)
        return energies

    observers: list[_Energies] = []
    GradientPass(model, tokens, settings or PassSettings()).run(observer)
    for one in observers:
        seen |= one.found
    weights = {}
    for i in range(model.block_count):
        for names in model.plan.siblings(i):
            each = [
                torch.cat(seen[name]).view(tokens.shape)
                for name in names
                if name in seen and not model.plan.by_name[name].routed
            ]
            alike = [e / e.mean() for e in each if float(e.mean()) > TINY]
            if alike:
                weights[names[0]] = torch.stack(alike).mean(0)
    return weights
