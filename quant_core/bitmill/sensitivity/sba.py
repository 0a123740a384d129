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
- candidates are rounded on clip-searched grids, as the profile's costs are, not on min-max;
- all p come from one pass that adds up ŷ(p) - y: a step is the product of two groups of inputs;
- that pass takes the first windows, about 32,768 tokens; salience and order take all of them.

With an activation order, groups are those of the ordered columns.

Of trellis codes W, x and H are what rotation makes of them (`quant/rotation.py`). A candidate's
error is not searched for: it is what rounding to 4 bits leaves of every group's row, scaled to the
code's distortion of that row at the candidate's rate. Rotated weights are nearly Gaussian, and what
a code leaves of them is noise of that size in every direction alike, as costs of the knapsack take
it to be (`sensitivity/trellis.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from bitmill.allocation.profile import SbaRecord
from bitmill.calibration.statistics import BlockState, Stream, collect
from bitmill.models.streamed import StreamedModel, weight_of
from bitmill.quant.codes import group_slices
from bitmill.quant.rewrites import NO_REWRITES
from bitmill.quant.rotation import packed_rewrites
from bitmill.runtime.ranks import Ranks
from bitmill.runtime.timer import timed
from bitmill.sensitivity.fisher import PROFILE_CLIP
from bitmill.solvers.factor import activation_order, squared_pivots
from bitmill.solvers.rtn import round_to_nearest
from bitmill.solvers.solver import check_weights
from bitmill_kernels.divergence.divergence import divergence
from bitmill_kernels.layout import GROUP_SIZE, group_count
from bitmill_kernels.linalg.hessian import add_product, product
from bitmill_kernels.trellis.code import DISTORTION

STAND_IN_WIDTH = 4
"""Of the rounding whose errors stand for those of trellis codes."""
DAMPING = (0.01, 0.05, 0.1)
CHUNK_TOKENS = 2048
"""Inputs on which every p is evaluated at once."""
EVALUATED_TOKENS = 32768
"""Inputs evaluated in all, where there are as many: whole windows, up to whole batches of them."""


@dataclass(frozen=True, eq=False)
class SbaInput:
    """What the linears that read one input share.

    order: i64 [K], packed column k is source column order[k]; weight: diag H and pivots: U_jj^2,
    f32 [K] each, in packed columns.
    """

    order: Tensor
    weight: Tensor
    pivots: Tensor

    @classmethod
    def prepare(cls, H: Tensor, order: Tensor | None = None, name: str = "linear") -> Self:
        """H f32 [K, K] and order i64 [K] (None: natural) in source columns."""
        if order is None:
            order = torch.arange(len(H))
        else:
            H = H[order][:, order]
        order = order.to(H.device)
        with timed("factor"):
            squares = squared_pivots(H, ladder=DAMPING, name=name)
        return cls(order, H.diagonal().clone(), squares)


class SbaSearch:
    """The search for one linear: feed it inputs with `add`, then read `record`."""

    def __init__(
        self,
        W: Tensor,
        shared: SbaInput,
        base: int,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        name: str = "linear",
        code: str = "affine",
    ) -> None:
        """W f32 [N, K] in source columns, of trellis codes behind its rewrites; bias f32 [N].

        dtype: of the inputs; weights and their changes are multiplied in it.
        """
        self._bias, self._shared, self._tokens = bias, shared, 0
        self._code = code
        check_weights({name: W})
        packed = W[:, shared.order]
        self._ranking = group_ranking(packed, shared.pivots)
        self._pairs = len(self._ranking) // 2
        self._divergence = torch.zeros(self._pairs + 1, dtype=torch.float64, device=W.device)
        self._W = W.to(dtype)
        self._quantize(packed, base)

    def _quantize(self, W: Tensor, base: int) -> None:
        """Changes of the weights W, packed: of all at p = 0 [N, K], and of two groups per step."""
        every = range(group_count(W.shape[1]))
        lows, highs = self._ranking[: self._pairs], self._ranking[::-1][: self._pairs]
        rounded, _ = self._rounded(W, every, base)
        change = torch.empty_like(self._W)
        change[:, self._shared.order] = (rounded - W).to(change.dtype)
        self._change = change
        parts, places = [], []
        for groups, width in ((lows, base - 1), (highs, base + 1)):
            swapped, columns = self._rounded(W, groups, width)
            parts.append((swapped - rounded[:, columns]).to(change.dtype))
            places.append(self._shared.order[columns])
        self._swaps = _side_by_side(*parts)
        self._columns = _side_by_side(*places)

    def _rounded(self, W: Tensor, groups: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
        """Some groups of W on grids of one width, f32 [N, c], and their packed columns i64 [c]."""
        place = torch.arange(W.shape[1]).split(GROUP_SIZE)
        if not groups:
            return W[:, :0], place[0][:0]
        columns = torch.cat([place[group] for group in groups]).to(W.device)
        weight, own = self._shared.weight[columns], W[:, columns]
        if self._code == "trellis":
            return distorted(own, width, weight), columns
        codes = round_to_nearest(own, (width,) * len(groups), weight, PROFILE_CLIP[width])
        return codes.values(), columns

    def add(self, x: Tensor) -> None:
        """Adds inputs x [T, K] in source column order, evaluating every p on them."""
        for rows in x.to(self._W.dtype).split(CHUNK_TOKENS):
            self._divergence += self._evaluate(rows)
        self._tokens += len(x)

    def all_reduce(self, group: Ranks) -> None:
        """Add what the other ranks have seen."""
        group.all_reduce(self._divergence)
        self._tokens = int(group.total(self._tokens))

    def _evaluate(self, x: Tensor) -> Tensor:
        """Summed KL of every p over the tokens of x, float64 [P + 1]."""
        y = product(x, self._W.T)
        source = torch.log_softmax(y if self._bias is None else y.add_(self._bias), 1)
        change = product(x, self._change.T)
        found = [divergence(source, change)]
        inputs = x[:, self._columns].split(2 * GROUP_SIZE, 1)
        swaps = self._swaps.split(2 * GROUP_SIZE, 1)
        for p in range(self._pairs):
            add_product(change, inputs[p], swaps[p].T)
            found.append(divergence(source, change))
        return torch.stack(found).sum(1, dtype=torch.float64)

    def record(self) -> SbaRecord:
        """The salience ranking and mean KL of p = 0, 1, ... on the inputs seen."""
        return SbaRecord(
            np.array(self._ranking, dtype=np.int32),
            (self._divergence / max(self._tokens, 1)).cpu().numpy(),
        )


def distorted(W: Tensor, rate: int, weight: Tensor) -> Tensor:
    """W f32 [N, c], rotated, with errors of the size that a trellis leaves at this rate: those of 4
    bits, scaled row by row in every group. weight: diag H f32 [c]."""
    widths = (STAND_IN_WIDTH,) * group_count(W.shape[1])
    error = round_to_nearest(W, widths, weight, PROFILE_CLIP[STAND_IN_WIDTH]).values() - W
    parts = []
    for _, part in group_slices(W.shape[1]):
        left, power = (one[:, part].square().mean(1, keepdim=True) for one in (error, W))
        size = torch.where(left > 0, DISTORTION[rate] * power / left, 0.0).sqrt()
        parts.append(error[:, part] * size)
    return W + torch.cat(parts, 1)


def group_ranking(W: Tensor, pivots: Tensor) -> list[int]:
    """Full groups of W f32 [N, K] from least to most salient; equal ones in column order.

    pivots: U_jj^2 f32 [K] of the same columns.
    """
    salience = W.double().square().sum(0) / pivots.double()
    full = W.shape[1] // GROUP_SIZE
    groups = salience[: full * GROUP_SIZE].view(full, GROUP_SIZE).sum(1)
    return [int(group) for group in torch.argsort(groups, stable=True).tolist()]


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
    batch: int = 8,
    code: str = "affine",
) -> tuple[dict[str, SbaRecord], dict[str, Tensor]]:
    """Records of every linear of a block and, for activation order, the order of each i64 [K].

    stream: block inputs [S, T, D] of the source model, whose float weights the block holds; the
    block's outputs take their place. One run of the block makes the Hessians and keeps the inputs
    that are evaluated, of `batch` windows at a time. `orders` gives orders already chosen.
    """
    linears, groups = model.linears(block, index), model.plan.siblings(index)
    windows = max(1, EVALUATED_TOKENS // (stream.hidden.shape[1] * stream.group.size))
    kept: dict[str, list[Tensor]] = {group[0]: [] for group in groups}

    def keep(part: slice, inputs: Mapping[str, Tensor]) -> None:
        if part.start < windows:
            for lead, x in inputs.items():
                kept[lead].append(x)

    state = BlockState(model, index, block, None, linears)
    seen = collect(state, groups, stream, batch=batch, advance=True, on_batch=keep)
    for first, *_ in groups[:1]:
        seen[first].check()
    chosen: dict[str, Tensor] = {}
    records: dict[str, SbaRecord] = {}
    for group in groups:
        lead = group[0]
        H, inputs = seen[lead].H, kept.pop(lead)
        for name in group:
            del seen[name]
        if order == "activation":
            found = orders[lead] if orders else activation_order(H.diagonal())
            chosen |= dict.fromkeys(group, found)
        own, rewrites = chosen.get(lead), NO_REWRITES
        if code == "trellis":
            own, rewrites = None, packed_rewrites(code, own)
            inputs = [rewrites.inputs(x) for x in inputs]
        shared = SbaInput.prepare(rewrites.hessian(H), own, lead)
        for name in group:
            bias = getattr(linears[name], "bias", None)
            search = SbaSearch(
                rewrites.weights(weight_of(linears[name]).float()),
                shared,
                base,
                bias=None if bias is None else bias.float(),
                dtype=model.dtype,
                name=name,
                code=code,
            )
            with timed("divergence"):
                for x in inputs:
                    search.add(x)
            search.all_reduce(stream.group)
            records[name] = search.record()
    return {name: records[name] for name in linears}, chosen


def _side_by_side(lows: Tensor, highs: Tensor) -> Tensor:
    """Groups along the last dimension, taken in turns: low 0, high 0, low 1, high 1 and so on."""
    pairs = [part.unflatten(-1, (-1, GROUP_SIZE)) for part in (lows, highs)]
    return torch.stack(pairs, -2).flatten(-3)
