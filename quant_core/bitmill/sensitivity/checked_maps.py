"""What bit-width maps cost in fact: KL of the model, quantized in haste, on held-out windows.

Costs of a profile are second-order and add up, so what they predict of a whole map is held against
a measurement before the map is refined. All maps pass through the model together, block by block:

    inputs   the first windows, `CALIBRATION_TOKENS` tokens or one window, pass through the float
             blocks and give every linear's H once
    weights  of each map by GPTQ alone: clip-searched grids and the column loop; no correction for
             the prefix, no compensated grids, no polishing
    judged   the first held-out windows, `JUDGED_TOKENS` tokens or one window, pass through the
             float blocks and those of each map; KL(source || map) of their next tokens, mean nats
             per token

Refinement gets less KL from the same map. What is compared is maps, all quantized alike. Of several
ranks each carries its own windows; weights are solved on all of them.

Costs can be corrected by parts of one map: each block alone and each kind of linear (all q_proj,
...) alone is quantized in an otherwise float model, on `PART_TOKENS` of the tokens. With
f = measured / predicted loss, the costs of a linear are multiplied by

    f(its block) f(its kind) / f(all of the map)                 within 1/8 and 8
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from bitmill.allocation.profile import SensitivityProfile
from bitmill.calibration.hooks import embed_windows, run_windows
from bitmill.calibration.statistics import BlockState, Stream, collect
from bitmill.calibration.windows import CalibrationSet
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.evaluation.logits import Window, WindowMeasures, perplexity_and_kl
from bitmill.models.streamed import StreamedModel, set_weight, weight_of
from bitmill.plan.block_memory import BATCH_TOKENS
from bitmill.plan.model_plan import Plan
from bitmill.quant.rewrites import Rewrites
from bitmill.refinement.embeddings import quantize_embeddings
from bitmill.runtime.graphs import graphs_kept
from bitmill.runtime.memory import free_device_bytes
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.runtime.timer import timed
from bitmill.solvers.gptq.column_loop import solve_siblings
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.transforms.outliers import OutlierColumns
from bitmill.transforms.transform import together

CALIBRATION_TOKENS = 32768
JUDGED_TOKENS = 16384
PART_TOKENS = 4096

LARGEST_FACTOR = 8.0
RESIDENT_SHARE = 0.25
"""Share of the accelerator's free memory that hidden states of parts may take."""

HASTY = GptqSettings(compensated=None, rounds=0)


@dataclass(frozen=True)
class Measured:
    """Measures of maps on the judged windows; mean KL of the first map's parts."""

    maps: dict[str, WindowMeasures]
    parts: dict[str, float]


def parts_of(plan: Plan) -> dict[str, frozenset[str]]:
    """The linears of each block and of each kind, by the name of the part."""
    parts: dict[str, set[str]] = {}
    for linear in plan.linears:
        for part in _parts_with(plan, linear.name):
            parts.setdefault(part, set()).add(linear.name)
    return {part: frozenset(names) for part, names in parts.items()}


def _parts_with(plan: Plan, name: str) -> tuple[str, str]:
    return f"block {plan.by_name[name].block}", name.rpartition(".")[2]


def corrected(
    profile: SensitivityProfile,
    plan: Plan,
    bit_widths: BitWidthMap,
    measured: float,
    alone: Measured,
) -> SensitivityProfile:
    """The profile with costs corrected by the parts of a map whose KL is `measured`."""
    parts, kept = parts_of(plan), profile.keeping(bit_widths.outliers)

    def factor(names: frozenset[str], found: float) -> float:
        linears = {name: bit_widths.linears[name] for name in names if name in bit_widths.linears}
        predicted = kept.predicted_loss(linears)
        return found / predicted if predicted > 0 and found > 0 else 1.0

    every = factor(frozenset(bit_widths.linears), measured)
    of_part = {part: factor(parts[part], kl) for part, kl in alone.parts.items()}
    linears = []
    for linear in profile.linears:
        found = 1.0
        if linear.name not in {matrix.name for matrix in plan.embeddings}:
            block, kind = (of_part.get(part, every) for part in _parts_with(plan, linear.name))
            found = min(LARGEST_FACTOR, max(1 / LARGEST_FACTOR, block * kind / every))
        linears.append(linear.scaled(found))
    return replace(profile, linears=tuple(linears))


def measure_maps(
    model: StreamedModel,
    calibration: CalibrationSet,
    maps: Mapping[str, BitWidthMap],
    orders: Mapping[str, Tensor],
    on_unit: Callable[[int, int, str, str], None],
    group: Ranks = SINGLE,
    *,
    parts: Mapping[str, frozenset[str]] | None = None,
) -> Measured:
    """Measure every map, by its name, on the held-out windows.

    orders: i64 [K] of the linears whose groups lie in another order than the model's. on_unit: told
    done, total, the unit and a message. group: ranks that make this call together; each gets all.
    parts: linears of the first map that are measured alone, by name.
    """
    length = calibration.tokens.shape[1]
    tokens = calibration.tokens[: max(1, CALIBRATION_TOKENS // length)]
    windows = calibration.held_out[: max(1, JUDGED_TOKENS // length)]
    own = group.shard(windows)
    few = own[: max(1, PART_TOKENS // length // group.size)]
    batch = max(1, BATCH_TOKENS // length)
    stream = Stream(_embedded(model, group.shard(tokens), batch), None, group)
    passing = _Passing(
        model=model,
        orders=orders,
        batch=batch,
        source=_embedded(model, own, batch),
        few=len(few),
        maps=[_map(model, tokens, own, bit_widths, batch) for bit_widths in maps.values()],
        parts=[_Part(names) for names in (parts or {}).values()],
    )
    with graphs_kept(model.device):
        for i in range(model.block_count):
            passing.block(i, stream)
            on_unit(i + 1, model.block_count, "block", "maps on held-out windows")
    source = _Outputs(model, passing.source)
    found = [
        perplexity_and_kl(source, _Outputs(one.model, one.hidden), own).gathered(
            group, len(windows)
        )
        for one in passing.maps
    ]
    count = group.total(len(few))
    start = _Outputs(model, passing.source[: len(few)])
    alone = {}
    for name, part in zip(parts or {}, passing.parts, strict=True):
        if part.hidden is not None:
            kl = perplexity_and_kl(start, _Outputs(model, part.hidden), few).kl
            alone[name] = group.total(float(kl.sum())) / count
    return Measured(dict(zip(maps, found, strict=True)), alone)


@dataclass(frozen=True, eq=False)
class _Map:
    """A map's model and its hidden states [S, T, D] of the judged windows."""

    bit_widths: BitWidthMap
    model: StreamedModel
    hidden: Tensor


@dataclass(eq=False)
class _Part:
    """Some linears of a map, and the hidden states [S, T, D] behind them; None before the first."""

    names: frozenset[str]
    hidden: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Passing:
    """Hidden states on their way through the model. source: of the judged windows [S, T, D], float;
    few: how many of them parts see."""

    model: StreamedModel
    orders: Mapping[str, Tensor]
    batch: int
    source: Tensor
    few: int
    maps: Sequence[_Map]
    parts: Sequence[_Part]

    @torch.no_grad()
    def block(self, i: int, stream: Stream) -> None:
        """Move everything behind block i. stream: float block inputs that H is collected from."""
        block = self.model.load_block(i)
        linears = self.model.linears(block, i)
        siblings = self.model.plan.siblings(i)
        state = BlockState(self.model, i, block, None, linears)
        seen = collect(state, siblings, stream, batch=self.batch, advance=True)
        for first, *_ in siblings[:1]:
            seen[first].check()
        own = {name: weight_of(linear).detach().clone() for name, linear in linears.items()}
        shared = []
        for names in siblings:
            rewrites = Rewrites.of_order(self.orders.get(names[0]))
            H = rewrites.hessian(seen[names[0]].H)
            shared.append((names, rewrites, Curvature.prepare(H, name=names[0])))
        seen.clear()
        for one in self.maps:
            solved = _solve(own, shared, one.bit_widths)
            self._run(i, block, linears, own | solved, one.hidden)
            if one is self.maps[0]:
                self._run_parts(i, block, linears, own, solved)
        self._run(i, block, linears, own, self.source)

    def _run_parts(
        self,
        i: int,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        own: Mapping[str, Tensor],
        solved: Mapping[str, Tensor],
    ) -> None:
        for part in self.parts:
            changed = {name: weight for name, weight in solved.items() if name in part.names}
            if part.hidden is None and changed:
                part.hidden = self._few()
            if part.hidden is not None:
                self._run(i, block, linears, {**own, **changed}, part.hidden)

    def _few(self) -> Tensor:
        """A copy of the source's hidden states, on the host where the accelerator has no room."""
        hidden = self.source[: self.few]
        needed = hidden.nbytes * len(self.parts)
        if hidden.is_cuda and needed > RESIDENT_SHARE * free_device_bytes(hidden.device):
            return hidden.cpu()
        return hidden.clone()

    def _run(
        self,
        i: int,
        block: nn.Module,
        linears: Mapping[str, nn.Module],
        weights: Mapping[str, Tensor],
        hidden: Tensor,
    ) -> None:
        for name, weight in weights.items():
            set_weight(linears[name], weight)
        run_windows(self.model, i, block, hidden, batch=self.batch, out=hidden)


class _Outputs:
    """Outputs of a model's last block, as a `LogitSource`."""

    def __init__(self, model: StreamedModel, hidden: Tensor) -> None:
        self._model, self._hidden = model, hidden

    def windows(self, tokens: Tensor) -> Iterator[Window]:
        """See `LogitSource`."""
        for i in range(len(self._hidden)):
            yield partial(self._head, self._hidden[i : i + 1])

    @torch.no_grad()
    def _head(self, hidden: Tensor, begin: int, end: int) -> Tensor:
        return self._model.logits(hidden[:, begin:end].to(self._model.device))[0]


def _solve(
    weights: Mapping[str, Tensor],
    shared: Sequence[tuple[Sequence[str], Rewrites, Curvature]],
    bit_widths: BitWidthMap,
) -> dict[str, Tensor]:
    """Dequantized weights f32 [N, K] of a block's linears in the map."""
    found, outliers = {}, OutlierColumns(bit_widths.outliers)
    for names, rewrites, curvature in shared:
        mine = [name for name in names if name in bit_widths.linears]
        for alike in together(mine, outliers.alike):
            sources = {name: rewrites.weights(weights[name].float()) for name in alike}
            own, every = curvature, dict.fromkeys(alike, rewrites)
            if fitted := outliers.fit(sources, curvature.H, SINGLE):
                sources = {name: fitted[name].weights(W) for name, W in sources.items()}
                every = {name: Rewrites([*rewrites, fitted[name]]) for name in alike}
                own = Curvature.prepare(fitted[alike[0]].hessian(curvature.H), name=alike[0])
            widths = [bit_widths.linears[name] for name in alike]
            with timed("solve"):
                solved = solve_siblings(list(sources.values()), own, widths, HASTY)
            for name, codes in zip(alike, solved, strict=True):
                weight = codes.finish()
                settled = every[name].settled(weight.dequantize)
                found[name] = weight.rewritten(settled).dequantize()
    return found


def _map(
    model: StreamedModel, tokens: Tensor, own: Tensor, bit_widths: BitWidthMap, batch: int
) -> _Map:
    """tokens: int64 [S, T] of calibration, for quantized heads; own: the judged windows."""
    changed = model
    if model.plan.embeddings:
        found, _ = quantize_embeddings(model, tokens, bit_widths.linears)
        matrices = {name: weight.dequantize() for name, weight in found.items()}
        changed = model.with_matrices(matrices)
    return _Map(bit_widths, changed, _embedded(changed, own, batch))


def _embedded(model: StreamedModel, tokens: Tensor, batch: int) -> Tensor:
    shape = (*tokens.shape, model.plan.hidden_size)
    hidden = torch.empty(shape, dtype=model.dtype, device=model.device)
    return embed_windows(model, tokens, batch=batch, out=hidden)
