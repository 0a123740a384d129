"""Norms and biases of a block, which transforms and learning may change too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from bitmill.formats.writing import DTYPES
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import PlannedTensor
from bitmill.refinement.straight import straight


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


class LearnedVectors(nn.Module):
    """A block's norms and biases as offsets f32 [D], in units of their first root mean square.

    From here on the block has tensors in the place of these parameters, which `install` sets.
    """

    def __init__(self, model: StreamedModel, index: int, block: nn.Module) -> None:
        super().__init__()
        self._places: list[tuple[str, nn.Module, str, torch.dtype, torch.dtype]] = []
        self._starts: list[Tensor] = []
        self._units: list[Tensor] = []
        self.offsets = nn.ParameterList()
        prefix = f"{model.plan.block_prefix}.{index}."
        for tensor, parameter in list(_parameters(model, index, block)):
            parent, _, leaf = tensor.module.removeprefix(prefix).rpartition(".")
            module, stored = block.get_submodule(parent), DTYPES[tensor.spec.dtype]
            self._places.append((tensor.module, module, leaf, parameter.dtype, stored))
            start = parameter.detach().float().clone()
            unit = start.square().mean().sqrt()
            self._starts.append(start)
            self._units.append(torch.where(unit > 0, unit, 1.0))
            self.offsets.append(nn.Parameter(torch.zeros_like(start)))
            del module._parameters[leaf]
        self.install()

    def install(self) -> None:
        """Give the block what the offsets make, as it would be stored, differentiable."""
        for value, (_, module, leaf, dtype, _) in zip(self._values(), self._places, strict=True):
            setattr(module, leaf, value.to(dtype))

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """Those that changed, by their names in the module tree, as stored, on the CPU."""
        places = zip(self._values(), self._starts, self._places, strict=True)
        return {
            name: value.to(stored).cpu()
            for value, start, (name, *_, stored) in places
            if not torch.equal(value, start)
        }

    def _values(self) -> Iterator[Tensor]:
        parts = zip(self._starts, self._units, self.offsets, self._places, strict=True)
        for start, unit, offset, (*_, stored) in parts:
            moved = start + unit * offset
            value: Tensor = straight(moved, moved.to(stored).float())
            yield value


def _parameters(
    model: StreamedModel, index: int, block: nn.Module
) -> Iterator[tuple[PlannedTensor, nn.Parameter]]:
    prefix, own = f"{model.plan.block_prefix}.{index}.", dict(block.named_parameters())
    for tensor in model.plan.tensors:
        place = tensor.module.removeprefix(prefix)
        if len(tensor.shape) == 1 and place != tensor.module and place in own:
            yield tensor, own[place]
