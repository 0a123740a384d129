"""How much each token, and each output of a linear, counts while it is solved: by loss gradients.

    a_t = |g_t| / mean_t |g_t|          g_t: gradient at the linear's outputs, one token's
    q_n = mean_t g_tn^2 / |g_t|

and of a_t the mean over the linears that read one input. To second order a change D of a linear's
weights raises the loss by the sum of (g_t^T D x_t)^2 / 2, so with H = sum_t a_t x_t x_t^T and
squares for a_t a solver would answer for the loss instead of for its own outputs (Fisher
information whose rows are taken as independent; arXiv 1503.05671, section 3), and costs of a
profile are weighted so (`sensitivity/fisher.py`). But squares let few tokens outweigh the others,
and to these few, noise of theirs included, a solver fits weights; their roots lie between squares
and tokens all alike. Measured on trellis codes of Gemma 3 270M, roots leave 0.80 to 0.90 of the
excess that squares leave, of SmolLM2-135M 0.95 from 196 windows and 1.01 from 64
(benchmarks/results/trellis-learning.md, run 6).

q_n is what the squared error of row n counts beside those of other rows, tokens weighted alike in
it; sum_n q_n is the mean of |g_t|. Solvers whose rows do not share anything have no use for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bitmill.calibration.gradients import GradientPass, PassSettings
from bitmill.calibration.undersampled_experts import fill_squares
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import Plan
from bitmill.runtime.ranks import SINGLE, Ranks

TINY = 1e-38
POWER = 1.0
"""Of gradients; 2 for squares."""
TOKENS, ROWS = "tokens.", "rows."
"""What names of tensors in a file begin with."""


class LossWeights(NamedTuple):
    """tokens: a f32 [S, T] of mean 1, by the first of linears that read one input. rows: q f32 [N]
    by linear. Both on the CPU.

    Routed experts, which see some of the tokens, have none of `tokens`, and of those that saw too
    few `rows` are filled up (`undersampled_experts.py`). Linears without any gradient have none.
    """

    tokens: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """By their names in a file."""
        tokens = {TOKENS + name: weight for name, weight in self.tokens.items()}
        return tokens | {ROWS + name: weight for name, weight in self.rows.items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> LossWeights:
        """From the tensors of one or more files."""

        def beginning(prefix: str) -> dict[str, Tensor]:
            found = {name: t for name, t in tensors.items() if name.startswith(prefix)}
            return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

        return cls(beginning(TOKENS), beginning(ROWS))


@dataclass
class _Seen:
    """|g|^power of tokens, batch by batch, and sums over them of |g|^(power - 2) g_n^2, f64 [N]."""

    tokens: list[Tensor] = field(default_factory=list)
    rows: Tensor | float = 0.0


class _Reached(NamedTuple):
    """A linear's tokens and columns."""

    tokens: int
    columns: int


class GradientEnergies:
    """Powers of the gradients at the outputs of one block's linears, batch by batch."""

    def __init__(self, power: float = POWER) -> None:
        self._power = power
        self._found: dict[str, _Seen] = {}

    def seen(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add one batch, gradient [T, N]."""
        found = self._found.setdefault(name, _Seen())
        norms = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float32)
        found.tokens.append(norms.pow(self._power))
        # Memory of the pass has room for one such copy, not for squares beside it.
        scaled = gradient * norms.clamp(min=TINY).pow(self._power / 2 - 1)[:, None]
        found.rows = found.rows + torch.linalg.vector_norm(scaled, dim=0).double().square()

    def weights(self, plan: Plan, block: int, length: int, group: Ranks = SINGLE) -> LossWeights:
        """The weights, with length T. group: ranks that saw other windows of the S; each gets the
        weights of all."""
        own = {
            name: (torch.cat(found.tokens).cpu(), torch.as_tensor(found.rows).cpu())
            for name, found in self._found.items()
        }
        parts = group.gather(own)
        sizes: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        reached: dict[str, _Reached] = {}
        for linear in plan.block_linears(block):
            name = linear.name
            none = torch.empty(0), torch.zeros(linear.rows, dtype=torch.float64)
            found = [part[name] for part in parts if name in part]
            of_tokens, of_rows = zip(none, *found, strict=True)
            sizes[name], sums[name] = torch.cat(of_tokens), torch.stack(of_rows).sum(0)
            reached[name] = _Reached(len(sizes[name]), linear.columns)
        rows = {
            name: (total / max(1, reached[name].tokens)).float()
            for name, total in fill_squares(sums, reached).items()
            if float(total.sum()) > TINY
        }
        tokens = {}
        for names in plan.siblings(block):
            alike = [
                sizes[name].view(-1, length) / sizes[name].mean()
                for name in names
                if not plan.by_name[name].routed and float(sizes[name].mean()) > TINY
            ]
            if alike:
                tokens[names[0]] = torch.stack(alike).mean(0)
        return LossWeights(tokens, rows)


def loss_weights(
    model: StreamedModel,
    tokens: Tensor,
    settings: PassSettings | None = None,
    *,
    power: float = POWER,
    group: Ranks = SINGLE,
) -> LossWeights:
    """`GradientEnergies.weights` of all blocks, by a pass of their own.

    tokens: int64 [S, T]; none, and no window of one token, has weights. power: of gradients.
    group: ranks that make this call together; each passes some of the windows through.
    Raises CalibrationError where gradients are not finite.
    """
    if not len(tokens) or tokens.shape[1] < 2:
        return LossWeights({}, {})
    found: list[LossWeights] = []
    watching: list[GradientEnergies] = []

    def observer(i: int) -> GradientEnergies:
        watching[:] = [GradientEnergies(power)]
        return watching[0]

    def done(i: int, gradient: Tensor) -> None:
        found.append(watching[0].weights(model.plan, i, tokens.shape[1], group))

    run = GradientPass(model, tokens, settings or PassSettings(), group=group)
    run.run(observer, on_block=done)
    return LossWeights.of_tensors({k: v for one in found for k, v in one.tensors().items()})
