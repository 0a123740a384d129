"""Refinement of one decoder block: true-sequential, on the outputs of the quantized prefix.

Linears are taken in stages of those that can be observed together ([q, k, v], [o], [gate, up],
[down]). For each stage the block is run with everything before the stage already quantized, so
that linears of later stages see, and answer to, the error of earlier ones.

With `asymmetric` the source model runs beside it, and each linear's target moves by the
least-squares share of what its output lacks (`calibration/statistics.py`, `solvers/gptq/solve.py`).
That is kept per linear only where the error of a sample of its rows on held-out tokens, mean |y' -
x ŵ^T|^2, falls. A linear that adds straight to the residual stream also works against what the
prefix has already lost there; which linears do is found by running the block, not from a list.

Where the stream belongs to several ranks, H and shifts are sums over all windows. The ranks divide
the factors of H, then the rows of each linear, which are independent given H; each gets what the
others made.

At return the block computes with the dequantized weights. Given up: re-measuring q, k and v after
each other, which read the same input and do not see each other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from bitmill.calibration.replay import Replay
from bitmill.calibration.statistics import (
    BlockState,
    InputStatistics,
    Stream,
    collect,
    residual_writers,
)
from bitmill.calibration.undersampled_experts import is_starved, starved_note
from bitmill.models.streamed import StreamedModel, set_weight, weight_of
from bitmill.quant.tensors import QuantizedWeight
from bitmill.results import LinearResult
from bitmill.runtime.ranks import Group
from bitmill.solvers.gptq.correction import Correction, Linear, sampled_rows
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.gptq.solve import Solved, check_weights, quantize_siblings, read_results
from bitmill.solvers.rtn import quantize_rtn

Refined = tuple[QuantizedWeight, LinearResult]


@dataclass(frozen=True)
class RefineSettings:
    """How a block is refined.

    asymmetric: answer to what the quantized prefix has lost; it needs the source stream and
    held-out tokens. ridges (see `gptq.quantize_siblings`) are tried, beside no correction
    batch: sequences per run of the block
    advance_source: replace the source's streams by what the block gives for them, on the way
    """

    method: Literal["rtn", "gptq"] = "gptq"
    gptq: GptqSettings = field(default_factory=GptqSettings)
    asymmetric: bool = False
    ridges: tuple[float, ...] = (0.0, 0.05, 0.5)
    batch: int = 8
    advance_source: bool = False


def refine_block(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    stream: Stream,
    widths: Mapping[str, tuple[int, ...]],
    *,
    settings: RefineSettings | None = None,
    orders: Mapping[str, Tensor] | None = None,
    held_out: Stream | None = None,
    on_stage: Callable[[], None] = lambda: None,
    replay: Replay | None = None,
) -> tuple[dict[str, QuantizedWeight], list[LinearResult]]:
    """Quantizes every linear of block `index` that `widths` names (full names).

    stream: calibration block inputs; held_out: others, for choosing. orders: name -> i64 [K],
    packed column k is input column orders[name][k]; linears reading one input share one order.
    on_stage: called after every stage. replay: a new one, for a caller who moves the same streams
    on by `advance_hidden`.

    Raises CalibrationError, naming the linear, where calibration gives non-finite inputs, and
    NumericalError where a factorization fails past the last damping.
    """
    settings = settings or RefineSettings()
    _check_streams(settings, stream, held_out)
    linears = model.linears(block, index)
    check_weights({n: weight_of(linears[n]).detach() for n in linears if n in widths})
    job = _BlockJob(
        _block_state(model, index, block, stream, settings, replay or Replay()),
        widths,
        settings,
        orders or {},
        stream.group,
    )
    done: dict[str, Refined] = {}
    stages = list(job.stages())
    for stage in stages:
        last = settings.advance_source and stage is stages[-1]
        refined = job.refine_stage(stage, stream, held_out, last)
        done |= refined
        job.install(refined)
        on_stage()
    read = {result.name: result for result in read_results(job.solved, stream.group)}
    results = [
        _with_tokens(read.get(name, result), job.tokens[name], model.plan.by_name[name].columns)
        for name, (_, result) in done.items()
    ]
    return {name: weight for name, (weight, _) in done.items()}, results


def _with_tokens(result: LinearResult, tokens: int, columns: int) -> LinearResult:
    """A result with the number of tokens that reached its linear, and a note where they are few."""
    notes = result.notes
    if is_starved(result.name, tokens, columns):
        notes += (starved_note(result.name, columns),)
    return result.model_copy(update={"tokens": tokens, "notes": notes})


@dataclass(frozen=True, eq=False)
class _BlockJob:
    state: BlockState
    widths: Mapping[str, tuple[int, ...]]
    settings: RefineSettings
    orders: Mapping[str, Tensor]
    ranks: Group
    solved: list[Solved] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)

    def stages(self) -> Iterator[list[list[str]]]:
        """Stages of input groups, without the linears that keep the source's precision."""
        for stage in self.state.model.plan.input_stages(self.state.index):
            groups = [[name for name in group if name in self.widths] for group in stage]
            if any(groups):
                yield [group for group in groups if group]

    def refine_stage(
        self,
        groups: Sequence[Sequence[str]],
        stream: Stream,
        held_out: Stream | None,
        advance_source: bool,
    ) -> dict[str, Refined]:
        batch = self.settings.batch
        seen = collect(
            self.state,
            groups,
            stream,
            batch=batch,
            advance_source=advance_source,
            judge=False,
            rows=self.ranks.part,
        )
        unseen: dict[str, InputStatistics] = {}
        if self.settings.asymmetric and held_out is not None:
            unseen = collect(
                self.state,
                groups,
                held_out,
                batch=batch,
                advance_source=advance_source,
                rows=self._sample,
            )
        checks = dict.fromkeys(one.check for one in (*seen.values(), *unseen.values()))
        result: dict[str, Refined] = {}
        try:
            for group in groups:
                result |= self._refine_group(group, seen, unseen)
        finally:  # before what such inputs may have led to
            for check in checks:
                check()
        return result

    def _refine_group(
        self,
        group: Sequence[str],
        seen: dict[str, InputStatistics],
        unseen: dict[str, InputStatistics],
    ) -> dict[str, Refined]:
        """Linears that share H (and so the order) are solved together; takes their statistics."""
        self.tokens.update({name: seen[name].tokens for name in group})
        if self.settings.method == "rtn":
            found = {name: self._rtn(name, seen[name]) for name in group}
        else:
            found = self._gptq(group, seen, unseen)
        return {name: self._gathered(name, found[name]) for name in group}

    def _weight(self, name: str) -> Tensor:
        """This rank's rows of a linear, f32."""
        W = weight_of(self.state.linears[name]).detach()
        return W[self.ranks.part(len(W))].float()

    def _sample(self, count: int) -> Tensor:
        """This rank's rows of the sample of a linear of `count` rows."""
        return sampled_rows(count, self.state.model.device, self.ranks.part(count))

    def _rtn(self, name: str, statistics: InputStatistics) -> Refined:
        return quantize_rtn(
            self._weight(name),
            self.widths[name],
            H=statistics.H,
            order=self.orders.get(name),
            clip=self.settings.gptq.clip,
            name=name,
            ranks=self.ranks,
        )

    def _gptq(
        self,
        names: Sequence[str],
        seen: dict[str, InputStatistics],
        unseen: dict[str, InputStatistics],
    ) -> dict[str, Refined]:
        """Plain solutions, or the corrected ones of least held-out error where they beat those."""
        settings, first = self.settings, names[0]
        linears = [self._linear(name, seen[name], unseen.pop(name, None)) for name in names]
        corrected = any(linear.correction for linear in linears)
        curvature = Curvature.prepare(
            seen[first].H,
            self.orders.get(first),
            damping=settings.gptq.damping,
            name=first,
            ridges=settings.ridges if corrected else (),
            ranks=self.ranks,
        )
        for name in names:
            del seen[name]
        solved = quantize_siblings(
            linears,
            curvature,
            ridges=settings.ridges,
            settings=settings.gptq,
            ranks=self.ranks,
        )
        self.solved.append(replace(solved, weights=()))
        return dict(zip(names, zip(solved.weights, solved.results, strict=True), strict=True))

    def _linear(
        self, name: str, statistics: InputStatistics, unseen: InputStatistics | None
    ) -> Linear:
        """This rank's rows of a linear, with what may correct them."""
        W, widths = self._weight(name), self.widths[name]
        if statistics.shift is None or unseen is None or unseen.shift is None:
            return Linear(name, W, widths)
        count = self.state.model.plan.by_name[name].rows
        sample = self._sample(count) - self.ranks.part(count).start
        some = W[sample]

        def judge(candidate: Tensor) -> Tensor:
            return unseen.error(some - candidate)

        return Linear(name, W, widths, Correction(statistics.shift, sample, judge))

    def _gathered(self, name: str, own: Refined) -> Refined:
        """All rows of a linear of which each rank has solved its own."""
        if self.ranks.size == 1:
            return own
        weight, result = own
        count = self.state.model.plan.by_name[name].rows
        codes, scales, zeros = (
            self.ranks.gather_rows(rows.contiguous(), count)
            for rows in (weight.codes, weight.scales.T, weight.zeros.T)
        )
        whole = replace(
            weight, codes=codes, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
        )
        return whole, result

    def install(self, refined: Mapping[str, Refined]) -> None:
        """Writes dequantized weights into the block."""
        for name, (weight, _) in refined.items():
            set_weight(self.state.linears[name], weight.dequantize())


def _check_streams(settings: RefineSettings, stream: Stream, held_out: Stream | None) -> None:
    if not settings.asymmetric:
        return
    if stream.source is None or held_out is None or held_out.source is None:
        raise ValueError(
            "the asymmetric correction needs the source model's block inputs for both the "
            "calibration and the held-out tokens: give them, or leave it out"
        )


def _block_state(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    stream: Stream,
    settings: RefineSettings,
    replay: Replay,
) -> BlockState:
    linears = model.linears(block, index)
    source = copy.deepcopy(block) if settings.asymmetric else None
    state = BlockState(model, index, block, source, linears, replay=replay)
    if settings.asymmetric:
        writers: tuple[str, ...] = ()
        if stream.group.first:
            writers = residual_writers(model, index, block, stream.hidden[:1])
        writers = stream.group.broadcast(writers)
        state = replace(state, writers=writers)
    return state
