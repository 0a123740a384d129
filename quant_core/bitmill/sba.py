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
- all p come from one pass: ŷ(p + 1) - ŷ(p) is the product of two groups of inputs;
- that pass takes the first windows of up to 32,768 tokens; salience and order take all of them.

With an activation order, groups are those of the ordered columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bitmill.blocks import StreamedModel, weight_of
from bitmill.codes import group_slices
from bitmill.distributed import Group
from bitmill.gptq import check_weights
from bitmill.grid import ClipSettings
from bitmill.hessian import activation_order, factor
from bitmill.input_statistics import BlockState, Stream, collect
from bitmill.observe import observe_ends
from bitmill.profile import SbaRecord
from bitmill.rtn import round_to_nearest
from bitmill.sensitivity import PROFILE_CLIP
from bitmill.timing import stage
from bitmill_kernels.hessian import product
from bitmill_kernels.layout import GROUP_SIZE

DAMPING = (0.01, 0.05, 0.1)


@dataclass(frozen=True)
class SbaSettings:
    """clip: the grid search of every candidate, None for the profile's quicker one.

    tokens: inputs evaluated at once; evaluated: limit of all inputs evaluated, in whole windows.
    """

    clip: ClipSettings | None = field(default_factory=ClipSettings)
    tokens: int = 2048
    evaluated: int = 32768
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
        dtype: torch.dtype = torch.float32,
        name: str = "linear",
    ) -> None:
        """W f32 [N, K], H f32 [K, K] and order i64 [K] in source columns; bias f32 [N].

        dtype: of the inputs; weights are multiplied in it, as the model would.
        """
        self._settings = settings or SbaSettings()
        self._order, self._bias = order, bias
        if order is not None:
            self._order = order = order.to(W.device)
            W, H = W[:, order], H[order][:, order]
        check_weights(W, name)
        self._W, self._tokens, self._dtype = W, 0, dtype
        self._ranking = group_ranking(W, H, name)
        self._pairs = len(self._ranking) // 2
        self._divergence = torch.zeros(self._pairs + 1, dtype=torch.float64, device=W.device)
        self._quantize(H.diagonal(), base)
        self._W = W.to(dtype)

    def _quantize(self, weight: Tensor, base: int) -> None:
        """ŷ(0)'s weights [N, K], and per p the change of its two groups [N, c]."""
        parts = dict(group_slices(self._W.shape[1]))
        lows, highs = self._ranking[: self._pairs], self._ranking[::-1][: self._pairs]
        rounded = self._rounded([base] * len(parts), weight)
        widths = dict.fromkeys(parts, base) | dict.fromkeys(lows, base - 1)
        widths |= dict.fromkeys(highs, base + 1)
        change = (self._rounded(list(widths.values()), weight) - rounded).to(self._dtype)
        self._base = rounded.to(self._dtype)
        self._steps = [
            [(parts[group], change[:, parts[group]]) for group in pair]
            for pair in zip(lows, highs, strict=True)
        ]

    def _rounded(self, widths: Sequence[int], weight: Tensor) -> Tensor:
        """W on the grids of these widths, one per group, f32 [N, K]."""
        parts = dict(group_slices(self._W.shape[1]))
        result = torch.empty_like(self._W)
        for width in sorted(set(widths)):
            groups = [group for group in parts if widths[group] == width]
            places = [torch.arange(parts[g].start, parts[g].stop) for g in groups]
            columns = torch.cat(places).to(weight.device)
            clip = self._settings.clip or PROFILE_CLIP[width]
            mine = self._W[:, columns]
            codes = round_to_nearest(mine, (width,) * len(groups), weight[columns], clip)
            result[:, columns] = codes.values()
        return result

    def add(self, x: Tensor) -> None:
        """Adds inputs x [T, K] in source column order, evaluating every p on them."""
        for rows in x.to(self._dtype).split(self._settings.tokens):
            ordered = rows if self._order is None else rows[:, self._order]
            self._divergence += self._evaluate(ordered)
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
                output += product(x[:, part], change.T)
            sums.append(_divergence(source, output))
        return torch.stack(sums)

    def _output(self, x: Tensor, W: Tensor) -> Tensor:
        y = product(x, W.T)
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
            dtype=model.dtype,
            name=name,
        )
    leads = {group[0]: group for group in groups}
    modules = {lead: linears[lead] for lead in leads}
    windows = settings.evaluated // (stream.hidden.shape[1] * stream.group.size)
    some = stream.hidden[: max(1, windows)]
    for start in range(0, len(some), settings.batch):
        part = some[start : start + settings.batch].to(model.device)
        ends = observe_ends(model, index, block, modules, {}, part)
        with stage("divergence"):
            for lead, x in ends.inputs.items():
                for name in leads[lead]:
                    searches[name].add(x)
    for search in searches.values():
        search.all_reduce(stream.group)
    return {name: search.record() for name, search in searches.items()}, chosen


def _divergence(source: Tensor, output: Tensor) -> Tensor:
    """Sum over tokens of KL(source || softmax(output)); source f32 [T, N] is a log-softmax."""
    candidate = torch.log_softmax(output, 1)
    terms = functional.kl_div(candidate, source, reduction="none", log_target=True)
    return terms.sum(dtype=torch.float64)
