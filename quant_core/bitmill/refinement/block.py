"""Refinement of one decoder block: true-sequential, on the outputs of the quantized prefix.

Linears are taken in steps of those that can be observed together ([q, k, v], [o], [gate, up],
[down]). For each step the block is run with everything before the step already quantized, so
that linears of later steps see, and answer to, the error of earlier ones.

Linears that read one input are rewritten by the transforms, then solved together. The solver sees
packed columns alone, and only what it needs to know of its inputs is collected.

Where it needs shifts, the source model runs beside the block, and each linear may answer for what
its output lacks (`calibration/statistics.py`), judged by the error of a sample of its rows on
held-out tokens, mean |y' - x ŵ^T|^2. A linear that adds straight to the residual stream also works
against what the prefix has already lost there; which linears do is found by running the block, not
from a list.

Where the stream belongs to several ranks, H and shifts are sums over all windows. The ranks divide
the rows of each linear, which are independent given H; each gets what the others made.

At return the block computes with the dequantized weights. Given up: re-measuring q, k and v after
each other, which read the same input and do not see each other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
from bitmill.config.methods import Statistic
from bitmill.models.streamed import StreamedModel, set_weight, weight_of
from bitmill.quant.rewrites import Rewrites
from bitmill.quant.tensors import Quantized
from bitmill.results import LinearResult
from bitmill.runtime.ranks import Ranks
from bitmill.solvers.solver import (
    Correction,
    Linear,
    Solved,
    Solver,
    check_weights,
    read_results,
    sampled_rows,
)
from bitmill.transforms.transform import Transform, together


@dataclass(frozen=True)
class RefineSettings:
    """How a block is refined.

    needs: the statistics that the solver needs. "shift" takes the source stream and held-out tokens
    transforms: rewrite the linears before, one after the other
    batch: sequences per run of the block
    advance_source: replace the source's streams by what the block gives for them, on the way
    alike: linears that read one input are rewritten and solved together where it says the same
    importance: what squared errors of rows count, f32 [N] by linear (`calibration/loss_weights.py`)
    tile: rows of a linear that ranks do not divide
    """

    solver: Solver
    needs: frozenset[Statistic] = frozenset({"hessian"})
    transforms: tuple[Transform, ...] = ()
    batch: int = 8
    advance_source: bool = False
    alike: Callable[[str], object] = lambda _: None
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    tile: int = 1


def refine_block(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    stream: Stream,
    widths: Mapping[str, tuple[int, ...]],
    settings: RefineSettings,
    *,
    held_out: Stream | None = None,
    on_step: Callable[[], None] = lambda: None,
    replay: Replay | None = None,
) -> tuple[dict[str, Quantized], list[LinearResult]]:
    """Quantizes every linear of block `index` that `widths` names (full names).

    stream: calibration block inputs; held_out: others, for choosing. on_step: called after every
    step. replay: a new one, for a caller who moves the same streams on by `advance_hidden`.

    Raises CalibrationError, naming the linear, where calibration gives non-finite inputs, and
    NumericalError where a factorization fails past the last damping.
    """
    _check_streams(settings, stream, held_out)
    linears = model.linears(block, index)
    check_weights({n: weight_of(linears[n]).detach() for n in linears if n in widths})
    job = _BlockJob(
        _block_state(model, index, block, stream, settings, replay or Replay()),
        widths,
        settings,
        stream.group,
    )
    done: dict[str, Quantized] = {}
    steps = list(job.steps())
    for step in steps:
        last = settings.advance_source and step is steps[-1]
        refined = job.refine_step(step, stream, held_out, last)
        done |= refined
        job.install(refined)
        on_step()
    read = {result.name: result for result in read_results(job.solved, stream.group)}
    results = [
        _with_tokens(read[name], job.tokens[name], model.plan.by_name[name].columns)
        for name in done
    ]
    return done, results


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
    ranks: Ranks
    solved: list[Solved] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)

    def steps(self) -> Iterator[list[list[str]]]:
        """Steps of siblings, without the linears that keep the source's precision."""
        for step in self.state.model.plan.input_steps(self.state.index):
            groups = [[name for name in group if name in self.widths] for group in step]
            if any(groups):
                yield [group for group in groups if group]

    def refine_step(
        self,
        groups: Sequence[Sequence[str]],
        stream: Stream,
        held_out: Stream | None,
        advance_source: bool,
    ) -> dict[str, Quantized]:
        seen: dict[str, InputStatistics] = {}
        unseen: dict[str, InputStatistics] = {}
        batch = self.settings.batch
        if self.settings.needs:
            seen = collect(
                self.state,
                groups,
                stream,
                batch=batch,
                advance_source=advance_source,
                judge=False,
                rows=self._part,
            )
        if "shift" in self.settings.needs and held_out is not None:
            unseen = collect(
                self.state,
                groups,
                held_out,
                batch=batch,
                advance_source=advance_source,
                rows=self._sample,
            )
        checks = dict.fromkeys(one.check for one in (*seen.values(), *unseen.values()))
        result: dict[str, Quantized] = {}
        try:
            for group in groups:
                for alike in together(group, self.settings.alike):
                    result |= self._solve(alike, seen, unseen)
        finally:  # before what such inputs may have led to
            for check in checks:
                check()
        return result

    def _solve(
        self,
        names: Sequence[str],
        seen: dict[str, InputStatistics],
        unseen: dict[str, InputStatistics],
    ) -> dict[str, Quantized]:
        """Linears that read one input, together; takes their statistics, whose memory is free while
        the solver works."""
        self.tokens.update({name: seen[name].tokens if seen else 0 for name in names})
        H = seen[names[0]].H if seen else None
        weights = {name: self._weight(name).float() for name in names}
        rewrites = {name: Rewrites() for name in names}
        for transform in self.settings.transforms:
            fitted = transform.fit(weights, H, self.ranks)
            for name, rewrite in fitted.items():
                weights[name] = rewrite.weights(weights[name])
                rewrites[name] = Rewrites([*rewrites[name], rewrite])
            if fitted and H is not None:
                H = fitted[names[0]].hessian(H)
        rewrites = {name: _answering(one, seen.get(name)) for name, one in rewrites.items()}
        linears = [
            Linear(
                name,
                weights.pop(name),
                self.widths[name],
                self._correction(
                    name, rewrites[name], seen.pop(name, None), unseen.pop(name, None)
                ),
                self._importance(name),
            )
            for name in names
        ]
        solved = self.settings.solver.solve(linears, H, self.ranks)
        self.solved.append(replace(solved, weights=()))
        found = {}
        for name, weight in zip(names, solved.weights, strict=True):
            count = self.state.model.plan.by_name[name].rows
            settled = rewrites[name].settled(weight.dequantize)
            found[name] = weight.rewritten(settled).gathered(self.ranks, count)
        return found

    def _part(self, count: int) -> slice:
        """This rank's rows of a linear of `count` rows: none where there are fewer tiles."""
        return self.ranks.part(count, unit=self.settings.tile)

    def _weight(self, name: str) -> Tensor:
        """This rank's rows of a linear."""
        W = weight_of(self.state.linears[name]).detach()
        return W[self._part(len(W))]

    def _importance(self, name: str) -> Tensor | None:
        """Of this rank's rows of a linear, on the device."""
        found = self.settings.importance.get(name)
        if found is None:
            return None
        return found[self._part(len(found))].to(self.state.model.device)

    def _sample(self, count: int) -> Tensor:
        """This rank's rows of the sample of a linear of `count` rows."""
        return sampled_rows(count, self.state.model.device, self._part(count))

    def _correction(
        self,
        name: str,
        rewrites: Rewrites,
        seen: InputStatistics | None,
        unseen: InputStatistics | None,
    ) -> Correction | None:
        """What may correct this rank's rows of a linear, in packed columns."""
        if seen is None or unseen is None or seen.shift is None or unseen.shift is None:
            return None
        judged, count = unseen, self.state.model.plan.by_name[name].rows
        sample = self._sample(count) - self._part(count).start
        some, own = self._weight(name)[sample].float(), rewrites.with_rows(sample)

        def judge(candidate: Tensor) -> Tensor:
            return judged.error(some - own.undo(candidate))

        return Correction(rewrites.moments(seen.shift), sample, judge)

    def install(self, refined: Mapping[str, Quantized]) -> None:
        """Writes dequantized weights into the block."""
        for name, weight in refined.items():
            set_weight(self.state.linears[name], weight.dequantize())


def _answering(rewrites: Rewrites, seen: InputStatistics | None) -> Rewrites:
    """Rewrites that answer for a part of what the linear's output lacks."""
    return rewrites if seen is None or seen.shift is None else rewrites.shifted(seen.shift)


def _check_streams(settings: RefineSettings, stream: Stream, held_out: Stream | None) -> None:
    if "shift" not in settings.needs:
        return
    if stream.source is None or held_out is None or held_out.source is None:
        raise ValueError(
            "a solver that needs shifts needs the source model's block inputs for both the "
            "calibration and the held-out tokens: give them"
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
    source = copy.deepcopy(block) if "shift" in settings.needs else None
    state = BlockState(model, index, block, source, linears, replay=replay)
    if source is not None:
        writers: tuple[str, ...] = ()
        if stream.group.first:
            writers = residual_writers(model, index, block, stream.hidden[:1])
        writers = stream.group.broadcast(writers)
        state = replace(state, writers=writers)
    return state
