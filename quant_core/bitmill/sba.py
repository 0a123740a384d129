"""Salience-determined bit allocation of one linear: SliM-LLM's, with its defects mended.

    S_g  = sum over rows i and columns j of group g of w_ij^2 / U_jj^2     (H^-1 = U^T U)
    p*   = argmin over p of mean_t KL(softmax(y_t) || softmax(ŷ_t(p)))

where ŷ(p) uses b - 1 bits for the p least salient groups, b + 1 for the p most salient and b for
the rest (arXiv 2405.14917, section 3.2; salience as in the published code, which is the marginal
cost in GPTQ's own order). Differences from that code:

- p = 0, plain uniform widths, and p = floor(G/2) are candidates, so fewer than 4 groups work;
- only full groups are swapped: the tail keeps b bits, and the mean over columns is exactly b;
- the Hessian is left as it was and damped relative to its mean; one ranking is searched and used;
- the bias stands on both sides, softmax and KL are fp32, and KL is taken from source to quantized;
- candidates are rounded on the clip-searched grid of the real quantizer, not on min-max;
- all p come from one pass: ŷ(p + 1) - ŷ(p) is the product of two groups of inputs.

With an activation order, groups are those of the ordered columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from bitmill.blocks import StreamedModel, weight_of
from bitmill.codes import group_slices
from bitmill.distributed import Group
from bitmill.gptq import check_weights
from bitmill.grid import ClipSettings, clip_search, nearest_codes, values
from bitmill.hessian import activation_order, factor
from bitmill.input_statistics import BlockState, Stream, collect
from bitmill.observe import observe
from bitmill.profile import SbaRecord
from bitmill.sensitivity import PROFILE_CLIP
from bitmill_kernels.layout import GROUP_SIZE

DAMPING = (0.01, 0.05, 0.1)


@dataclass(frozen=True)
class SbaSettings:
    """clip: the grid search of every candidate, None for the profile's quicker one.

    tokens: inputs evaluated at once.
    """

    clip: ClipSettings | None = field(default_factory=ClipSettings)
    tokens: int = 2048
    batch: int = 8


class SbaSearch:
    """The search for one linear: feed it inputs with `add`, then read `record`."""

    def __init__(
        self,
        W: Tensor,
        H: Tensor,
        base: int,
        *,
        bias: Tensor | None = None,
        order: Tensor | None = None,
        settings: SbaSettings | None = None,
        name: str = "linear",
    ) -> None:
        """W f32 [N, K], H f32 [K, K] and order i64 [K] in source columns; bias f32 [N]."""
        self._settings = settings or SbaSettings()
        self._order, self._bias = order, bias
        if order is not None:
            self._order = order = order.to(W.device)
            W, H = W[:, order], H[order][:, order]
        check_weights(W, name)
        self._W, self._tokens = W, 0
        self._ranking = group_ranking(W, H, name)
        self._pairs = len(self._ranking) // 2
        self._divergence = torch.zeros(self._pairs + 1, dtype=torch.float64, device=W.device)
        self._quantize(H.diagonal(), base)

    def _quantize(self, weight: Tensor, base: int) -> None:
        """ŷ(0)'s weights [N, K], and per p the change of its two groups [N, c]."""
        parts = dict(group_slices(self._W.shape[1]))
        rounded = {group: self._rounded(part, weight, base) for group, part in parts.items()}
        self._base = torch.cat(list(rounded.values()), 1)
        self._steps: list[list[tuple[slice, Tensor]]] = []
        for p in range(self._pairs):
            low, high = self._ranking[p], self._ranking[-1 - p]
            self._steps.append(
                [
                    (parts[group], self._rounded(parts[group], weight, width) - rounded[group])
                    for group, width in ((low, base - 1), (high, base + 1))
                ]
            )

    def _rounded(self, part: slice, weight: Tensor, width: int) -> Tensor:
        block = self._W[:, part].contiguous()
        clip = self._settings.clip or PROFILE_CLIP[width]
        grid = clip_search(block, width, weight[part], settings=clip)
        return values(nearest_codes(block, grid, width), grid)

    def add(self, x: Tensor) -> None:
        """Adds inputs x [T, K] in source column order, evaluating every p on them."""
        for start in range(0, len(x), self._settings.tokens):
            rows = x[start : start + self._settings.tokens].float()
            rows = rows if self._order is None else rows[:, self._order]
            self._divergence += self._evaluate(rows)
        self._tokens += len(x)

    def all_reduce(self, group: Group) -> None:
        """Add what the other ranks have seen."""
        group.all_reduce(self._divergence)
        self._tokens = int(group.total(self._tokens))

    def _evaluate(self, x: Tensor) -> Tensor:
        """Summed KL of every p over the tokens of x, float64 [P + 1]."""
        source = torch.log_softmax(self._output(x, self._W), 1)
        output = self._output(x, self._base)
        sums = [_divergence(source, output)]
        for step in self._steps:
            for part, change in step:
                output = output + x[:, part] @ change.T
            sums.append(_divergence(source, output))
        return torch.stack(sums)

    def _output(self, x: Tensor, W: Tensor) -> Tensor:
        y = x @ W.T
        return y if self._bias is None else y + self._bias

    def record(self) -> SbaRecord:
        """The salience ranking and mean KL of p = 0, 1, ... on the inputs seen."""
        return SbaRecord(
            np.array(self._ranking, dtype=np.int32),
            (self._divergence / max(self._tokens, 1)).cpu().numpy(),
        )


def group_ranking(W: Tensor, H: Tensor, name: str = "linear") -> list[int]:
    """Full groups of W f32 [N, K] from least to most salient; equal ones in column order."""
    inverse = factor(H, ladder=DAMPING, name=name).upper.diagonal().square()
    salience = W.double().square().sum(0) / inverse.double()
    full = W.shape[1] // GROUP_SIZE
    groups = salience[: full * GROUP_SIZE].view(full, GROUP_SIZE).sum(1)
    return [int(group) for group in torch.argsort(groups, stable=True)]


@torch.no_grad()
def profile_block_sba(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    stream: Stream,
    base: int,
    *,
    order: Literal["natural", "activation"] = "natural",
    orders: Mapping[str, Tensor] | None = None,
    settings: SbaSettings | None = None,
) -> tuple[dict[str, SbaRecord], dict[str, Tensor]]:
    """Records of every linear of a block and, for activation order, the order of each i64 [K].

    stream: block inputs [S, T, D] of the source model, whose float weights the block holds. One
    pass makes the Hessians, a second one all divergences. `orders` gives orders already chosen.
    """
    settings = settings or SbaSettings()
    linears = model.linears(block, index)
    groups = model.plan.input_groups(index)
    state = BlockState(model, index, block, None, linears)
    statistics = collect(state, groups, stream, batch=settings.batch)
    chosen = dict(orders or {})
    if order == "activation" and not orders:
        chosen = {name: activation_order(seen.H) for name, seen in statistics.items()}
    searches = {}
    for name, module in linears.items():
        bias = getattr(module, "bias", None)
        searches[name] = SbaSearch(
            weight_of(module).float(),
            statistics[name].H,
            base,
            bias=None if bias is None else bias.float(),
            order=chosen.get(name),
            settings=settings,
            name=name,
        )
    leads = {group[0]: group for group in groups}
    modules = {lead: linears[lead] for lead in leads}
    for start in range(0, len(stream.hidden), settings.batch):
        part = stream.hidden[start : start + settings.batch].to(model.device)
        for lead, seen in observe(model, index, block, modules, part).items():
            for name in leads[lead]:
                searches[name].add(seen.x)
    for search in searches.values():
        search.all_reduce(stream.group)
    return {name: search.record() for name, search in searches.items()}, chosen


def _divergence(source: Tensor, output: Tensor) -> Tensor:
    """Sum over tokens of KL(source || softmax(output)); source f32 [T, N] is a log-softmax."""
    candidate = torch.log_softmax(output, 1)
    return (source.exp() * (source - candidate)).sum(dtype=torch.float64)
