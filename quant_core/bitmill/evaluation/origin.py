"""Whether a packed folder was made from a source model, told by the weights of both.

Kept tensors are compared by value, but for norms and biases of blocks, which transforms and
learning change; quantized linears of the first and the last block by the cosine of their weights
with the source's, which is near 1 at two bits, above 0.4 at one bit and near 0 for another model,
or by that of their signs, which folded scales of rows and columns leave as they are.
Dropped columns, and rows and columns that packing moved are left out. A source in another dtype is
the same model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bitmill.errors import FormatError, InputError
from bitmill.formats.codec import open_checkpoint
from bitmill.models.reader import CheckpointSource
from bitmill.plan.model_plan import Plan, PlannedTensor

ROWS = 64
"""Rows of a tensor that are compared."""
LARGEST_DIFFERENCE = 0.02
LEAST_COSINE = 0.2


def check_made_from(folder: Path, source: CheckpointSource, plan: Plan) -> None:
    """Raise InputError (code `other_source`) where `folder` holds another model's weights.

    plan: of the source, with the linears of the folder's map.
    """
    checkpoint = open_checkpoint(folder)
    try:
        checkpoint.check_linears(plan.shapes)
    except FormatError as error:
        raise _other(folder, source, error.message) from error
    for kept in plan.tensors:
        if foldable(plan, kept):
            continue
        if kept.name not in checkpoint.headers:
            raise _other(folder, source, f"it has no {kept.name}")
        packed, original = checkpoint.tensor(kept.name), source.tensor(kept)
        if packed.shape != original.shape or _difference(packed, original) > LARGEST_DIFFERENCE:
            raise _other(folder, source, f"{kept.name} differs")
    moved = {name for reader, names in plan.feeders.items() for name in (reader, *names)}
    for block in {0, plan.block_count - 1}:
        for linear in plan.block_linears(block):
            if linear.name in moved:
                continue
            weight = checkpoint.weight(linear.shape)[:ROWS]
            held = weight.any(0)  # columns of dropped groups are zero
            original = source.weight(linear)[:ROWS]
            if _likeness(weight[:, held], original[:, held]) < LEAST_COSINE:
                raise _other(folder, source, f"{linear.name} has other weights")


def foldable(plan: Plan, tensor: PlannedTensor) -> bool:
    """Whether it is a norm or a bias of a block, which may be another than the source's."""
    inside = tensor.module.startswith(f"{plan.block_prefix}.")
    return inside and len(tensor.shape) == 1 and tensor.module.endswith((".weight", ".bias"))


def _difference(packed: Tensor, original: Tensor) -> float:
    """Relative difference of the first rows, in any dtypes."""
    a, b = packed[:ROWS].double(), original[:ROWS].double()
    return float((a - b).norm() / b.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _likeness(packed: Tensor, original: Tensor) -> float:
    return max(_cosine(packed, original), _cosine(packed.sign(), original.sign()))


def _cosine(a: Tensor, b: Tensor) -> float:
    """1 where either is zero, as a dead linear's weights are."""
    a, b = a.double(), b.double()
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size > 0 else 1.0


def _other(folder: Path, source: CheckpointSource, why: str) -> InputError:
    return InputError(
        f"{folder.name} was not made from {source.folder.name}: {why}; give the model that it was "
        "quantized from",
        code="other_source",
        param="source",
    )
