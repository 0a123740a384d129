"""What every width costs quantized input embeddings and output heads.

    cost[b] = mean KL(source || source with this matrix rounded to b bits), nats per token

measured on the first `COST_TOKENS` calibration tokens by running the model. Unlike a linear's cost
it is no estimate, so it needs no gradient. Codes are those of `refinement/embeddings.py`, which are
affine beside linears in any code; a width that only these have costs as much as the next smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from bitmill.allocation.profile import FloatArray, LinearProfile
from bitmill.config.bit_width_map import group_columns
from bitmill.config.codes import CODES, embedding_width
from bitmill.evaluation.logits import StreamedLogits, perplexity_and_kl
from bitmill.io import atomic as storage
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import PlannedLinear
from bitmill.refinement.embeddings import first_windows, head_squares, round_embedding


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
    windows, squares = first_windows(tokens), head_squares(model, tokens)
    reference = StreamedLogits(model, remember=True)
    costs: dict[int, float] = {}
    for width in (one for one in widths if one in CODES["affine"].legal):
        rounded, _ = round_embedding(model, matrix, (width,) * matrix.shape.groups, squares)
        other = model.with_matrices({matrix.name: rounded.dequantize()})
        measured = perplexity_and_kl(reference, StreamedLogits(other), windows)
        costs[width] = max(0.0, float(measured.kl.mean()))
    return [costs[embedding_width(width, costs)] for width in widths]


def _profile(matrix: PlannedLinear, costs: FloatArray) -> LinearProfile:
    share = np.array(group_columns(matrix.columns)) / matrix.columns
    return LinearProfile(matrix.name, matrix.rows, matrix.columns, share[:, None] * costs)
