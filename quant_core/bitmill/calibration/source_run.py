"""One run of all windows through a block of the source model, which takes the stream to its end.

On the way it gives the second moments of every input, as `input_statistics.collect` does for
refinement, and keeps the inputs of the first windows for measurements that need both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitmill.calibration.hessian import HessianAccumulator, all_reduce
from bitmill.calibration.hooks import observe_ends
from bitmill.calibration.statistics import Stream
from bitmill.calibration.undersampled_experts import filled_means
from bitmill.models.streamed import StreamedModel


class SourceRun(NamedTuple):
    """By the first linear of each input group: H f32 [K, K], and inputs [T, K] that were kept."""

    H: dict[str, Tensor]
    inputs: dict[str, list[Tensor]]


@torch.no_grad()
def run_source_block(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    stream: Stream,
    *,
    batch: int,
    keep: int = 0,
) -> SourceRun:
    """Replaces stream.hidden [S, T, D], the block's inputs, by its outputs.

    H is that of all ranks' windows, filled up where experts saw few tokens
    (`undersampled_experts.py`).
    keep: first windows of this rank whose inputs are kept, rounded up to whole batches; a tensor
    per batch, on the model's device.
    """
    hidden, device = stream.hidden, model.device
    linears = model.linears(block, index)
    leads = {group[0]: linears[group[0]] for group in model.plan.input_groups(index)}
    hessians = {
        lead: HessianAccumulator(
            model.plan.by_name[lead].columns, device, name=f"the input of {lead}"
        )
        for lead in leads
    }
    inputs: dict[str, list[Tensor]] = {lead: [] for lead in leads}
    for start in range(0, len(hidden), batch):
        part = slice(start, start + batch)
        ends = observe_ends(
            model, index, block, leads, {}, hidden[part].to(device, non_blocking=True), whole=True
        )
        for lead, x in ends.inputs.items():
            hessians[lead].add(x)
            if start < keep:
                inputs[lead].append(x)
        assert ends.block is not None
        hidden[part].copy_(ends.block, non_blocking=True)
    check = all_reduce(hessians.values(), stream.group)
    filled = filled_means(hessians)
    means = {
        lead: filled[lead] if lead in filled else hessian.mean()
        for lead, hessian in hessians.items()
    }
    check()
    return SourceRun(means, inputs)
