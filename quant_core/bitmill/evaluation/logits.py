"""Perplexity, KL against the source model and top-1 agreement, per window, in bounded memory.

For a window of T tokens, p the source's and q the candidate's next-token distribution at each of
its T-1 predicting positions:

    nll       = mean of -ln q(next token)          perplexity = exp(mean nll over windows)
    increase  = mean nll less the source's
    KL        = mean of sum_v p(v) (ln p(v) - ln q(v))                        (nats per token)
    agreement = share of positions where both have the same most likely token

Standard errors are those of the mean over windows; perplexity's is perplexity * se(nll). Logits of
both models are compared `chunk` positions at a time in float32 and never kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from bitmill.calibration.hooks import embed_windows, run_windows
from bitmill.errors import NumericalError
from bitmill.models.streamed import StreamedModel
from bitmill.results import TextQuality
from bitmill.runtime.ranks import Ranks

CHUNK = 256
CPU_ROWS = 64
"""Positions compared at once on a CPU, where larger temporaries only cost page faults."""

Window = Callable[[int, int], Tensor]
"""Logits [end - begin, V] of the positions begin to end (exclusive) of one window."""


class LogitSource(Protocol):
    """A model as evaluation sees it."""

    def windows(self, tokens: Tensor) -> Iterator[Window]:
        """One `Window` per row of `tokens` [S, T], in order; each is used before the next."""
        ...


class StreamedLogits:
    """A streamed model: all windows pass through block by block, their hidden states wait on the
    host (S*T*D values), the head is applied to the positions asked for.

    replace: called with each loaded block before it runs, e.g. to put quantized weights into it.
    on_block: called with the number of finished blocks and their total.
    remember: keep the last windows' hidden states, for comparing several candidates with one model.
    known: windows and their hidden states where these have been computed before.
    """

    def __init__(
        self,
        model: StreamedModel,
        *,
        replace: Callable[[int, nn.Module], None] | None = None,
        on_block: Callable[[int, int], None] | None = None,
        remember: bool = False,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._model, self._replace, self._on_block = model, replace, on_block
        self._remember = remember
        self._last = known

    def watched(self, on_block: Callable[[int, int], None]) -> StreamedLogits:
        """The same model, which tells of its blocks."""
        return StreamedLogits(
            self._model,
            replace=self._replace,
            on_block=on_block,
            remember=self._remember,
            known=self._last,
        )

    def last_block(self, tokens: Tensor) -> Tensor:
        """Its outputs [S, T, D] for windows i64 [S, T], on the CPU."""
        if self._last is not None and torch.equal(self._last[0], tokens):
            return self._last[1]
        model = self._model
        hidden = embed_windows(model, tokens, batch=1)
        for i in range(model.block_count):
            block = model.load_block(i)
            if self._replace is not None:
                self._replace(i, block)
            run_windows(model, i, block, hidden, batch=1, out=hidden)
            if self._on_block is not None:
                self._on_block(i + 1, model.block_count)
        if self._remember:
            self._last = tokens, hidden
        return hidden

    @torch.no_grad()
    def windows(self, tokens: Tensor) -> Iterator[Window]:
        """See `LogitSource`."""
        for hidden in self.last_block(tokens).split(1):
            yield partial(self._head, hidden)

    @torch.no_grad()
    def _head(self, hidden: Tensor, begin: int, end: int) -> Tensor:
        return self._model.logits(hidden[:, begin:end])[0]


@dataclass(frozen=True, eq=False)
class WindowMeasures:
    """Means over the predicting positions of each window, all float64 [S].

    nll: of the candidate; source_nll: of the source.
    """

    nll: Tensor
    source_nll: Tensor
    kl: Tensor
    agreement: Tensor
    length: int

    def gathered(self, group: Ranks, count: int) -> WindowMeasures:
        """The measures of all `count` windows, of which each rank has its part."""
        own = torch.stack([self.nll, self.source_nll, self.kl, self.agreement], 1)
        nll, source_nll, kl, agreement = group.gather_rows(own, count).unbind(1)
        return WindowMeasures(nll, source_nll, kl, agreement, self.length)

    def candidate(self) -> TextQuality:
        """The candidate's figures; raises `NumericalError` where any is not finite."""
        return _quality(self)

    def source(self) -> TextQuality:
        """The source's own figures."""
        none = self.kl * 0
        same = WindowMeasures(self.source_nll, self.source_nll, none, none + 1, self.length)
        return _quality(same)


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _quality(found: WindowMeasures) -> TextQuality:
    nll, kl = found.nll, found.kl
    increase = nll - found.source_nll
    mean = float(nll.mean())
    if not math.isfinite(mean) or not torch.isfinite(kl).all():
        bad = int((~(torch.isfinite(nll) & torch.isfinite(kl))).nonzero()[0])
        raise NumericalError(
            f"evaluation gave a non-finite loss or KL, first in window {bad} of {len(nll)}: the "
            "model's outputs overflow; evaluate in float32",
            code="non_finite_evaluation",
        )
    perplexity = math.exp(min(mean, 700.0))
    return TextQuality(
        windows=len(nll),
        tokens=len(nll) * found.length,
        perplexity=perplexity,
        perplexity_se=perplexity * _standard_error(nll),
        kl=float(kl.mean()),
        kl_se=_standard_error(kl),
        loss_increase=float(increase.mean()),
        loss_increase_se=_standard_error(increase),
        top1_agreement=float(found.agreement.mean()),
    )


def _nll(logits: Tensor, target: Tensor) -> Tensor:
    """Summed negative log-likelihood of `target` int64 [C] under float32 logits [C, V]."""
    chosen = logits.gather(-1, target[:, None])[:, 0]
    return (logits.logsumexp(-1) - chosen).double().sum()


def _compare(source: Tensor | None, candidate: Tensor, target: Tensor) -> Tensor:
    """Sums over positions of (nll, source nll, KL, agreement); logits [C, V], target int64 [C]."""
    q = candidate.float()
    target = target.to(q.device)
    nll = _nll(q, target)
    if source is None:
        return torch.stack([nll, nll, nll * 0, nll * 0 + len(target)]).cpu()
    p = source.float().to(q.device)
    log_p = p.log_softmax(-1)
    kl = (log_p.exp() * (log_p - q.log_softmax(-1))).sum(-1).double().sum()
    same = (p.argmax(-1) == q.argmax(-1)).double().sum()
    return torch.stack([nll, _nll(p, target), kl, same]).cpu()


def _compare_pieces(source: Tensor | None, candidate: Tensor, target: Tensor) -> Tensor:
    step = CPU_ROWS if candidate.device.type == "cpu" else len(candidate)
    total = torch.zeros(4, dtype=torch.float64)
    for row in range(0, len(candidate), step):
        part = slice(row, row + step)
        total += _compare(source if source is None else source[part], candidate[part], target[part])
    return total


@torch.no_grad()
def perplexity_and_kl(
    reference: LogitSource | None,
    candidate: LogitSource,
    tokens: Tensor,
    *,
    chunk: int = CHUNK,
    on_window: Callable[[int, int], None] | None = None,
) -> WindowMeasures:
    """Compare a candidate with the source model on windows `tokens` int64 [S, T].

    Without a reference KL is 0 and agreement 1. Each window is scored alone, T-1 predictions.
    on_window: called with the number of finished windows and S.
    """
    count, length = tokens.shape
    sums = torch.zeros(count, 4, dtype=torch.float64)
    sources: Iterator[Window | None] = iter([None] * count)
    if reference is not None:
        sources = reference.windows(tokens)
    pairs = zip(sources, candidate.windows(tokens), strict=True)
    for i, (source, model) in enumerate(pairs if count else ()):  # a rank may have none
        for begin in range(0, length - 1, chunk):
            end = min(begin + chunk, length - 1)
            p = source(begin, end) if source is not None else None
            sums[i] += _compare_pieces(p, model(begin, end), tokens[i, begin + 1 : end + 1])
        if on_window is not None:
            on_window(i + 1, count)
    means = sums / (length - 1)
    return WindowMeasures(means[:, 0], means[:, 1], means[:, 2], means[:, 3], length)
