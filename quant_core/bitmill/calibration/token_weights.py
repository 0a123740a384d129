"""How much each token counts while a linear is solved: as the size of the loss gradient there.

    a_t = |g_t| / mean_t |g_t|          g_t: gradient at the linear's outputs, one token's

and the mean of that over the linears that read one input. To second order a change D of a linear's
weights raises the loss by the sum of (g_t^T D x_t)^2 / 2, so with H = sum_t a_t x_t x_t^T and
squares for a_t a solver would answer for the loss instead of for its own outputs (Fisher
information whose rows are taken alike; arXiv 1503.05671, section 3), and costs of a profile are
weighted so (`sensitivity/fisher.py`). But squares let few tokens outweigh the others, and to these
few, noise of theirs included, a solver fits weights; their roots lie between squares and tokens all
alike. Measured on trellis codes of Gemma 3 270M, roots leave 0.80 to 0.90 of the excess that
squares leave, of SmolLM2-135M 0.95 from 196 windows and 1.01 from 64
(benchmarks/results/trellis-learning.md, run 6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.calibration.gradients import GradientPass, PassSettings
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import Plan
from bitmill.runtime.ranks import SINGLE, Ranks

TINY = 1e-38
POWER = 1.0
"""Of gradients; 2 for squares."""


class TokenEnergies:
    """|g|^power of every token at the outputs of one block's linears, batch by batch."""

    def __init__(self, power: float = POWER) -> None:
        self._power = power
        self._found: dict[str, list[Tensor]] = {}

    def seen(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add one batch, gradient [T, N]."""
        norms = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float32)
        self._found.setdefault(name, []).append(norms.pow(self._power))

    def weights(
        self, plan: Plan, block: int, length: int, group: Ranks = SINGLE
    ) -> dict[str, Tensor]:
        """Weights f32 [S, T] of mean 1 on the CPU, by the first of linears that read one input.

        Routed experts, which see some of the tokens, and linears without any gradient have none.
        length: T. group: ranks that saw other windows of the S; each gets the weights of all.
        """
        own = {
            name: torch.cat(found).cpu().view(-1, length)
            for name, found in self._found.items()
            if not plan.by_name[name].routed
        }
        parts, weights = group.gather(own), {}
        for names in plan.siblings(block):
            seen = [[part[name] for part in parts if name in part] for name in names]
            each = [torch.cat(windows) for windows in seen if windows]
            alike = [e / e.mean() for e in each if float(e.mean()) > TINY]
            if alike:
                weights[names[0]] = torch.stack(alike).mean(0)
        return weights


def token_weights(
    model: StreamedModel,
    tokens: Tensor,
    settings: PassSettings | None = None,
    *,
    power: float = POWER,
    group: Ranks = SINGLE,
) -> dict[str, Tensor]:
    """`TokenEnergies.weights` of all blocks, by a pass of their own.

    tokens: int64 [S, T]; none, and no window of one token, has weights. power: of gradients.
    group: ranks that make this call together; each passes some of the windows through.
    Raises CalibrationError where gradients are not finite.
    """
    if not len(tokens) or tokens.shape[1] < 2:
        return {}
    weights: dict[str, Tensor] = {}
    watching: list[TokenEnergies] = []

    def observer(i: int) -> TokenEnergies:
        watching[:] = [TokenEnergies(power)]
        return watching[0]

    def done(i: int, gradient: Tensor) -> None:
        weights.update(watching[0].weights(model.plan, i, tokens.shape[1], group))

    run = GradientPass(model, tokens, settings or PassSettings(), group=group)
    run.run(observer, on_block=done)
    return weights
