"""Quantized input embeddings and output heads: their codes, and what every width costs.

A matrix [V, D] is packed like a linear, in groups of 128 columns of one width. Its grids are found
by the clip search, columns weighed by the mean square of the head's input where the matrix is the
head (tied or not), alike where it is only looked up; codes are the nearest ones:

    cost[b] = mean KL(source || source with this matrix rounded to b bits), nats per token

measured on the first `COST_TOKENS` calibration tokens by running the model. Unlike a linear's cost
it is no estimate, so it needs no gradient. Given up: compensation between the columns of a head,
which would harm the lookups of a tied one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitmill.allocation.profile import FloatArray, LinearProfile
from bitmill.config.bit_width_map import code_bits, group_columns
from bitmill.evaluation.logits import CHUNK, StreamedLogits, perplexity_and_kl
from bitmill.io import atomic as storage
from bitmill.models.streamed import StreamedModel, capture_inputs
from bitmill.plan.model_plan import PlannedLinear
from bitmill.quant.grid import ClipSettings
from bitmill.quant.tensors import QuantizedWeight
from bitmill.results import LinearQuality
from bitmill.solvers.rtn import round_to_nearest

COST_TOKENS = 4096


def round_embedding(
    model: StreamedModel, matrix: PlannedLinear, widths: Sequence[int], squares: Tensor
) -> tuple[QuantizedWeight, float]:
    """Codes of one matrix [V, D], and their relative error sum(h (W - Q)^2) / sum(h W^2).

    h = squares f32 [D], the mean square of the head's input, for a head, else 1.
    """
    W = model.source.weight(matrix).to(model.device).float()
    h = squares.to(W) if model.is_head(matrix.name) else torch.ones_like(W[0])
    codes = round_to_nearest(W, tuple(widths), h, ClipSettings())
    error = float(((W - codes.values()).square() @ h).sum(dtype=torch.float64))
    total = float((W.square() @ h).sum(dtype=torch.float64))
    return codes.finish(None), error / total if total > 0 else error


@torch.no_grad()
def head_squares(model: StreamedModel, tokens: Tensor) -> Tensor:
    """Mean square of the head's input, f32 [D], on the first windows of `tokens` int64 [S, T]."""
    windows = _first(tokens)
    total = torch.zeros((), dtype=torch.float64)

    def sink(_: str, x: Tensor) -> None:
        nonlocal total
        total = total + x.double().square().sum(0).cpu()

    for window in StreamedLogits(model).windows(windows):
        for begin in range(0, windows.shape[1], CHUNK):
            end = min(begin + CHUNK, windows.shape[1])
            capture_inputs({"head": model.head}, partial(window, begin, end), sink)
    return (total / windows.numel()).float()


def embedding_profiles(
    model: StreamedModel,
    tokens: Tensor,
    widths: Sequence[int],
    folder: Path,
    on_unit: Callable[[int, int, str, str], None],
) -> tuple[LinearProfile, ...]:
    """Costs of every embedding and head of the plan, spread over its groups by columns.

    tokens: int64 [S, T]. folder: where finished matrices are kept for a run that goes on.
    """
    path = folder / "embeddings.json"
    known: dict[str, list[float]] = storage.read_json(path) if path.is_file() else {}
    matrices = model.plan.embeddings
    for done, matrix in enumerate(matrices, 1):
        if matrix.name not in known:
            known[matrix.name] = _costs(model, tokens, matrix, widths)
            storage.write_json(path, known)
        on_unit(done, len(matrices), "embedding", matrix.name)
    return tuple(_profile(matrix, np.array(known[matrix.name])) for matrix in matrices)


def _costs(
    model: StreamedModel, tokens: Tensor, matrix: PlannedLinear, widths: Sequence[int]
) -> list[float]:
    windows, squares = _first(tokens), head_squares(model, tokens)
    reference = StreamedLogits(model, remember=True)
    costs = []
    for width in widths:
        rounded, _ = round_embedding(model, matrix, (width,) * matrix.shape.groups, squares)
        other = model.with_matrices({matrix.name: rounded.dequantize()})
        measured = perplexity_and_kl(reference, StreamedLogits(other), windows)
        costs.append(max(0.0, float(measured.kl.mean())))
    return costs


def _profile(matrix: PlannedLinear, costs: FloatArray) -> LinearProfile:
    share = np.array(group_columns(matrix.columns)) / matrix.columns
    return LinearProfile(matrix.name, matrix.rows, matrix.columns, share[:, None] * costs)


def quantize_embeddings(
    model: StreamedModel, tokens: Tensor, widths: Mapping[str, Sequence[int]]
) -> tuple[dict[str, QuantizedWeight], list[LinearQuality]]:
    """Codes of every embedding and head of the plan at the map's widths; tokens int64 [S, T]."""
    squares = head_squares(model, tokens)
    weights, reports = {}, []
    for matrix in model.plan.embeddings:
        weights[matrix.name], error = round_embedding(model, matrix, widths[matrix.name], squares)
        bits = code_bits([matrix.shape], widths)
        reports.append(LinearQuality(name=matrix.name, code_bits=bits, relative_error=error))
    return weights, reports


def _first(tokens: Tensor) -> Tensor:
    return tokens[: max(1, COST_TOKENS // tokens.shape[1])]
