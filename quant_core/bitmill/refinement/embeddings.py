"""Codes of quantized input embeddings and output heads.

A matrix [V, D] is packed like a linear, in groups of 128 columns of one width. Its grids are found
by the clip search, columns weighed by the mean square of the head's input where the matrix is the
head (tied or not), alike where it is only looked up; codes are the nearest ones. Given up:
compensation between the columns of a head, which would harm the lookups of a tied one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from bitmill.config.bit_width_map import code_bits
from bitmill.evaluation.logits import CHUNK, StreamedLogits
from bitmill.models.streamed import StreamedModel, capture_inputs
from bitmill.plan.model_plan import PlannedLinear
from bitmill.quant.grid import ClipSettings
from bitmill.quant.tensors import Quantized
from bitmill.results import LinearResult
from bitmill.solvers.rtn import round_to_nearest

COST_TOKENS = 4096


def round_embedding(
    model: StreamedModel, matrix: PlannedLinear, widths: Sequence[int], squares: Tensor
) -> tuple[Quantized, float]:
    """Codes of one matrix [V, D], and their relative error sum(h (W - Q)^2) / sum(h W^2).

    h = squares f32 [D], the mean square of the head's input, for a head, else 1.
    """
    W = model.source.weight(matrix).to(model.device).float()
    h = squares.to(W) if model.is_head(matrix.name) else torch.ones_like(W[0])
    codes = round_to_nearest(W, tuple(widths), h, ClipSettings())
    error = float(((W - codes.values()).square() @ h).sum(dtype=torch.float64))
    total = float((W.square() @ h).sum(dtype=torch.float64))
    return codes.finish(), error / total if total > 0 else error


@torch.no_grad()
def head_squares(model: StreamedModel, tokens: Tensor) -> Tensor:
    """Mean square of the head's input, f32 [D], on the first windows of `tokens` int64 [S, T]."""
    windows = first_windows(tokens)
    total = torch.zeros((), dtype=torch.float64)

    def sink(_: str, x: Tensor) -> None:
        nonlocal total
        total = total + x.double().square().sum(0).cpu()

    for window in StreamedLogits(model).windows(windows):
        for begin in range(0, windows.shape[1], CHUNK):
            end = min(begin + CHUNK, windows.shape[1])
            capture_inputs({"head": model.head}, partial(window, begin, end), sink)
    return (total / windows.numel()).float()


def quantize_embeddings(
    model: StreamedModel, tokens: Tensor, widths: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Quantized], list[LinearResult]]:
    """Codes of every embedding and head of the plan at the map's widths; tokens int64 [S, T]."""
    squares = head_squares(model, tokens)
    weights, reports = {}, []
    for matrix in model.plan.embeddings:
        weights[matrix.name], error = round_embedding(model, matrix, widths[matrix.name], squares)
        bits = code_bits([matrix.shape], widths)
        reports.append(LinearResult(name=matrix.name, code_bits=bits, relative_error=error))
    return weights, reports


def first_windows(tokens: Tensor) -> Tensor:
    return tokens[: max(1, COST_TOKENS // tokens.shape[1])]
