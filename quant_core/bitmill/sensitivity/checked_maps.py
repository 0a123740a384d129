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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bitmill.calibration.hooks import embed_windows, run_windows
from bitmill.calibration.statistics import BlockState, Stream, collect
from bitmill.calibration.windows import CalibrationSet
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.evaluation.logits import Window, WindowMeasures, perplexity_and_kl
from bitmill.models.streamed import StreamedModel, set_weight, weight_of
from bitmill.plan.block_memory import BATCH_TOKENS
from bitmill.quant.rewrites import Rewrites
from bitmill.refinement.embeddings import quantize_embeddings
from bitmill.runtime.ranks import SINGLE, Group
from bitmill.runtime.timer import timed
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.gptq.solve import GptqSolver
from bitmill.solvers.solver import Linear

CALIBRATION_TOKENS = 32768
JUDGED_TOKENS = 16384

HASTY = GptqSolver(GptqSettings(compensated=None, rounds=0))


@dataclass(frozen=True)
class _Judged:
    """One map's model and its hidden states [S, T, D] of the judged windows."""

    bit_widths: BitWidthMap
    model: StreamedModel
    hidden: Tensor


class _Outputs:
    """Outputs of a model's last block, as a `LogitSource`."""

    def __init__(self, model: StreamedModel, hidden: Tensor) -> None:
        self._model, self._hidden = model, hidden

    def windows(self, tokens: Tensor) -> Iterator[Window]:
        """See `LogitSource`."""
        for hidden in self._hidden.split(1):
            yield partial(self._head, hidden)

    @torch.no_grad()
    def _head(self, hidden: Tensor, begin: int, end: int) -> Tensor:
        return self._model.logits(hidden[:, begin:end])[0]


def measure_maps(
    model: StreamedModel,
    calibration: CalibrationSet,
    maps: Mapping[str, BitWidthMap],
    orders: Mapping[str, Tensor],
    on_unit: Callable[[int, int, str, str], None],
    group: Group = SINGLE,
) -> dict[str, WindowMeasures]:
    """Measures of every map, by its name, on the held-out windows.

    orders: i64 [K] of the linears whose groups lie in another order than the model's. on_unit: told
    done, total, the unit and a message. group: ranks that make this call together; each gets all.
    """
    length = calibration.tokens.shape[1]
    tokens = calibration.tokens[: max(1, CALIBRATION_TOKENS // length)]
    windows = calibration.held_out[: max(1, JUDGED_TOKENS // length)]
    own = group.shard(windows)
    batch = max(1, BATCH_TOKENS // length)
    stream = Stream(_embedded(model, group.shard(tokens), batch), None, group)
    source = _embedded(model, own, batch)
    judged = {}
    for name, bit_widths in maps.items():
        changed = _with_embeddings(model, tokens, bit_widths)
        judged[name] = _Judged(bit_widths, changed, _embedded(changed, own, batch))
    for i in range(model.block_count):
        _pass_block(model, i, stream, source, list(judged.values()), orders, batch)
        on_unit(i + 1, model.block_count, "block", "maps on held-out windows")
    return {
        name: perplexity_and_kl(
            _Outputs(model, source), _Outputs(one.model, one.hidden), own
        ).gathered(group, len(windows))
        for name, one in judged.items()
    }


def _embedded(model: StreamedModel, tokens: Tensor, batch: int) -> Tensor:
    shape = (*tokens.shape, model.plan.hidden_size)
    hidden = torch.empty(shape, dtype=model.dtype, device=model.device)
    return embed_windows(model, tokens, batch=batch, out=hidden)


def _with_embeddings(
    model: StreamedModel, tokens: Tensor, bit_widths: BitWidthMap
) -> StreamedModel:
    if not model.plan.embeddings:
        return model
    found, _ = quantize_embeddings(model, tokens, bit_widths.linears)
    return model.with_matrices({name: weight.dequantize() for name, weight in found.items()})


@torch.no_grad()
def _pass_block(
    model: StreamedModel,
    i: int,
    stream: Stream,
    source: Tensor,
    judged: Sequence[_Judged],
    orders: Mapping[str, Tensor],
    batch: int,
) -> None:
    """Move all hidden states behind block i."""
    block = model.load_block(i)
    linears = model.linears(block, i)
    siblings = model.plan.siblings(i)
    state = BlockState(model, i, block, None, linears)
    seen = collect(state, siblings, stream, batch=batch, advance=True)
    seen[siblings[0][0]].check()
    run_windows(model, i, block, source, batch=batch, out=source)
    weights = {name: weight_of(linear).detach().clone() for name, linear in linears.items()}
    curvatures: dict[str, tuple[Rewrites, Curvature]] = {}
    for names in siblings:
        rewrites = Rewrites.of_order(orders.get(names[0]))
        H = rewrites.hessian(seen[names[0]].H)
        curvatures[names[0]] = rewrites, Curvature.prepare(H, name=names[0])
    seen.clear()
    for one in judged:
        for names in siblings:
            rewrites, curvature = curvatures[names[0]]
            asked = [
                Linear(n, rewrites.weights(weights[n].float()), one.bit_widths.linears[n])
                for n in names
                if n in one.bit_widths.linears
            ]
            with timed("solve"):
                solved = HASTY.solve_with(asked, curvature, SINGLE) if asked else None
            for linear, weight in zip(asked, solved.weights if solved else (), strict=True):
                set_weight(linears[linear.name], weight.rewritten(rewrites).dequantize())
        run_windows(model, i, block, one.hidden, batch=batch, out=one.hidden)
