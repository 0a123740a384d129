"""Scales of input channels, folded into what writes those channels, before a block is solved.

    W x = (W diag(s)) (x / s)

x / s comes from the norm or the linear that writes x: its factor or its rows are divided by s.
Nothing of s is left to be stored. Which module writes an input is found by running the block, not
from a list: every norm, and every linear with as many rows, is scaled by powers of two on trial. It
is the writer if the readers put out what they did, and everything else reads what it did. So a norm
that others read too, a linear behind an activation, or values that several heads share are found
out; inputs without a writer keep their scale.

A norm's factor may be its weight or 1 + weight (Gemma). It is rounded as it will be stored, and the
readers are scaled by what that leaves, so that the block's function stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitmill.calibration.hooks import observe_ends
from bitmill.calibration.statistics import BlockState, Stream, collect
from bitmill.formats.writing import DTYPES
from bitmill.models.streamed import StreamedModel, set_weight, weight_of
from bitmill.runtime.ranks import Ranks
from bitmill.transforms.channels import ChannelInputs
from bitmill.transforms.transform import ChannelScaling

TRIAL_TOKENS = 64
TOLERANCE, ROUNDINGS = 1e-4, 4.0
"""How far a trial may be off: the least relative difference, and that in units of the precision."""
FACTORLESS = 0.1
"""Share of a norm's factors that may be 0, which no division changes."""


@dataclass(frozen=True, eq=False)
class Writer:
    """What writes an input: of a norm, stored as `dtype`, the factor is offset + weight."""

    module: nn.Module
    dtype: torch.dtype | None = None
    offset: float = 0.0

    @property
    def parameters(self) -> list[Tensor]:
        """Weight and bias."""
        return [p for p in self.module.parameters(recurse=False) if p is not None]

    def divide(self, scales: Tensor) -> Tensor:
        """Divide outputs by scales f32 [K]; returns what they really are divided by, f32 [K]."""
        bias = getattr(self.module, "bias", None)
        if self.dtype is None:
            weight_of(self.module).div_(scales[:, None])
        else:
            weight = self.module.weight
            assert isinstance(weight, Tensor)
            before = weight.float() + self.offset
            after = (before / scales - self.offset).to(self.dtype).to(weight.dtype)
            really = before / (after.float() + self.offset)
            near = (really > scales / 2) & (really < 2 * scales)
            weight.copy_(torch.where(near, after, weight))
            scales = torch.where(near, really, 1.0)
        if bias is not None:
            bias.div_(scales)
        return scales


@torch.no_grad()
def fold_scales(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    stream: Stream,
    widths: Mapping[str, tuple[int, ...]],
    orders: Mapping[str, Tensor],
    scaling: ChannelScaling,
    *,
    batch: int,
) -> None:
    """Scale the inputs of the block's linears in place, where they have a writer.

    stream: block inputs; widths: of the linears that will be quantized; orders: their columns' i64
    [K] when groups are formed, where they are not the source's.
    """
    linears, writers = model.linears(block, index), {}
    groups = [group for group in model.plan.siblings(index) if group[0] in widths]
    for group in groups:
        found = None
        if stream.group.first:
            found = writer_name(model, index, block, group, stream.hidden[:1, :TRIAL_TOKENS])
        found = stream.group.broadcast(found)
        if found is not None:
            writers[group[0]] = _writer(model, index, block, *found)
    groups = [group for group in groups if group[0] in writers]
    if not groups:
        return
    state, largest = BlockState(model, index, block, None, linears), _Largest()
    seen = collect(state, groups, stream, batch=batch, judge=False, on_batch=largest.look)
    for group in groups:
        seen[group[0]].check()
        H, order = seen[group[0]].H, orders.get(group[0])
        inputs = ChannelInputs(H, largest.of(group[0], H, stream.group))
        weights = {name: weight_of(linears[name]).float() for name in group}
        if order is None:
            scales = scaling.scales(weights, widths, inputs, stream.group)
        else:
            order = order.to(H.device)
            ordered = {name: W[:, order] for name, W in weights.items()}
            scales = scaling.scales(ordered, widths, inputs.ordered(order), stream.group)
            scales = torch.empty_like(scales).scatter_(0, order, scales)
        scales = writers[group[0]].divide(scales)
        for name in group:
            set_weight(linears[name], weight_of(linears[name]).float() * scales)


class _Largest:
    """Largest |x| of every channel, by the first of linears that read an input."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def look(self, _: slice, inputs: Mapping[str, Tensor]) -> None:
        """inputs: [T, K] of one batch."""
        for name, x in inputs.items():
            largest = x.abs().amax(0).float()
            known = self._found.get(name)
            self._found[name] = largest if known is None else torch.maximum(known, largest)

    def of(self, name: str, H: Tensor, ranks: Ranks) -> Tensor:
        """f32 [K] over all ranks' windows, of which this one may have none; H of that input."""
        own = self._found.get(name)
        own = torch.zeros_like(H[0]) if own is None else own
        return ranks.gather_rows(own[None], ranks.size).amax(0)


def writer_name(
    model: StreamedModel, index: int, block: nn.Module, group: Sequence[str], hidden: Tensor
) -> tuple[str, float] | None:
    """Full name and offset of what writes the input of linears `group`; hidden [1, T, D]."""
    plan, linears = model.plan, model.linears(block, index)
    if any(plan.by_name[name].routed for name in group):
        return None
    hidden = hidden.to(model.device, model.dtype)
    others = {name: module for name, module in linears.items() if name not in group}
    readers = {name: linears[name] for name in group}

    def outcome() -> list[Tensor]:
        seen = observe_ends(model, index, block, others, readers, hidden, whole=True)
        assert seen.block is not None
        return [*seen.outputs.values(), *seen.inputs.values(), seen.block - hidden]

    before, K = outcome(), plan.by_name[group[0]].columns
    powers = torch.randint(-1, 2, (K,), generator=torch.Generator().manual_seed(index))
    scales = torch.exp2(powers.float()).to(model.device)
    allowed = max(TOLERANCE, ROUNDINGS * torch.finfo(model.dtype).eps)
    for name, offset in _candidates(model, index, block, group, K):
        writer = _writer(model, index, block, name, offset)
        with _restored([*writer.parameters, *(weight_of(module) for module in readers.values())]):
            really = writer.divide(scales)
            if ((really / scales).log2().abs() > 0.1).float().mean() > FACTORLESS:
                continue
            for module in readers.values():
                weight_of(module).mul_(really)
            after = outcome()
        if len(before) == len(after) and all(map(_alike(allowed), before, after)):
            return name, offset
    return None


def _candidates(
    model: StreamedModel, index: int, block: nn.Module, group: Sequence[str], K: int
) -> Iterator[tuple[str, float]]:
    """Norms, whose factor may be weight or 1 + weight, then linears."""
    prefix = f"{model.plan.block_prefix}.{index}."
    for tensor in model.plan.tensors:
        name, _, leaf = tensor.module.rpartition(".")
        if name.startswith(prefix) and leaf == "weight" and tensor.shape == (K,):
            yield name, 0.0
            yield name, 1.0
    for linear in model.plan.block_linears(index):
        if linear.rows == K and linear.name not in group and not linear.routed:
            yield linear.name, 0.0


def _writer(model: StreamedModel, index: int, block: nn.Module, name: str, offset: float) -> Writer:
    module = block.get_submodule(name.removeprefix(f"{model.plan.block_prefix}.{index}."))
    kept = {tensor.module: DTYPES[tensor.spec.dtype] for tensor in model.plan.tensors}
    return Writer(module, None if name in model.plan.by_name else kept[f"{name}.weight"], offset)


@contextmanager
def _restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Gives tensors back the values that they had."""
    kept = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)


def _alike(allowed: float) -> Callable[[Tensor, Tensor], bool]:
    def alike(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:  # another expert was chosen
            return False
        return bool((a.float() - b.float()).norm() <= allowed * a.float().norm())

    return alike
