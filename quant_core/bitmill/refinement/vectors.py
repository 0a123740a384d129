"""Norms and biases of a block, which transforms and learning may change too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from bitmill.formats.writing import DTYPES
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import PlannedTensor


def vectors(model: StreamedModel, index: int, block: nn.Module) -> dict[str, Tensor]:
    """A copy of each, by its name in the module tree, in the dtype in which it is stored."""
    return {
        tensor.module: parameter.detach().to(DTYPES[tensor.spec.dtype], copy=True)
        for tensor, parameter in _parameters(model, index, block)
    }


def changed_vectors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose values are others now."""
    return {name: value for name, value in after.items() if not torch.equal(value, before[name])}


@torch.no_grad()
def restore_vectors(
    model: StreamedModel, index: int, block: nn.Module, changed: Mapping[str, Tensor]
) -> None:
    """Put changed ones into the block."""
    for tensor, parameter in _parameters(model, index, block):
        if tensor.module in changed:
            parameter.copy_(changed[tensor.module])


def _parameters(
    model: StreamedModel, index: int, block: nn.Module
) -> Iterator[tuple[PlannedTensor, nn.Parameter]]:
    prefix, own = f"{model.plan.block_prefix}.{index}.", dict(block.named_parameters())
    for tensor in model.plan.tensors:
        place = tensor.module.removeprefix(prefix)
        if len(tensor.shape) == 1 and place != tensor.module and place in own:
            yield tensor, own[place]
