"""One decoder block learned against the float block's outputs.

    minimize over the learner's parameters   error(block(x_q; w), t)
    x_q: the block's inputs from the already quantized blocks before it
    t:   the float block's outputs on the float model's inputs; with `augmented_loss` the mean of
         these and of the float block's outputs on x_q, which has the gradient of the sum of both
         errors

Held-out sequences choose among the parameters along the way, and decide in the end between the
learned weights and the ones the block came with: a block is never handed on worse than it came.
The report says which it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitmill.errors import CalibrationError
from bitmill.models.dtypes import mixed_precision, product_dtype
from bitmill.models.streamed import StreamedModel, set_weight, weight_of
from bitmill.quant.tensors import QuantizedWeight
from bitmill.refinement.omniquant.adam import DescentReport, descend
from bitmill.refinement.omniquant.metric import OutputMetric
from bitmill.refinement.omniquant.rows import LearnableLinear, learnable
from bitmill.refinement.omniquant.settings import (
    Learner,
    LearningSettings,
    learning_rates,
    make_learner,
)
from bitmill.results import BlockQuality
from bitmill.runtime.process import deterministic

HELD_OUT_BATCH = 4
RESIDENT_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class BlockData:
    """Inputs from the quantized prefix and float targets, [S, T, D] each, on any device.

    texts: the same of texts that are only measured, by name.
    """

    inputs: Tensor
    targets: Tensor
    held_out_inputs: Tensor
    held_out_targets: Tensor
    texts: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LearnedBlock:
    """The result: weights as kept, and the report."""

    weights: dict[str, QuantizedWeight]
    report: BlockQuality


def check_held_out(sequences: int) -> None:
    """Raise `CalibrationError` where there are none."""
    if not sequences:
        raise CalibrationError(
            "learning has no held-out sequences to choose by: set calibration.held_out above 0",
            code="no_held_out",
            param="calibration.held_out",
        )


def learn_block(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    starts: Mapping[str, QuantizedWeight],
    data: BlockData,
    settings: LearningSettings,
    *,
    seed: int,
    metric: OutputMetric | None = None,
) -> LearnedBlock:
    """Learn block `index`, starting from `starts` (full name -> weights, e.g. GPTQ's).

    block: a loaded copy of the block; on return its linears hold the kept weights. metric: the
    block's fisher error, None for the plain one. Float weights are read from the model again.
    """
    began = time.perf_counter()
    check_held_out(len(data.held_out_inputs))
    data = _resident(data, model.device)
    metric = (metric or OutputMetric()).to(model.device)
    float_block = model.load_block(index)
    if settings.augmented_loss:
        data = _augmented(model, index, float_block, data)
    weights = {name: weight_of(m) for name, m in model.linears(float_block, index).items()}
    learner = make_learner(settings, starts, weights, model.device)
    linears = model.linears(block, index)
    with deterministic(), learnable(block, linears) as slots:
        run = _Run(model, index, block, slots, data, metric)
        start = learner.rows.dequantize(starts)
        before, texts_before = run.held_out_loss(start), run.text_losses(start)
        descent = _descend(run, learner, settings, seed)
        exported = learner.export()
        after = run.held_out_loss(learner.rows.dequantize(exported))
        improved = after < before
        kept = exported if improved else dict(starts)
        final = learner.rows.dequantize(kept)
        texts_after = run.text_losses(final)
    for name, weight in final.items():
        set_weight(linears[name], weight)
    report = BlockQuality(
        index=index,
        mode=settings.mode,
        kept="learned" if improved else "start",
        loss_before=before,
        loss_after=after if improved else before,
        texts={name: (loss, texts_after[name]) for name, loss in texts_before.items()},
        steps=descent.steps,
        best_step=descent.best_step,
        rollbacks=descent.rollbacks,
        gave_up=descent.gave_up,
        recorded=descent.recorded,
        seconds=time.perf_counter() - began,
        curve=tuple(descent.curve),
    )
    return LearnedBlock(kept, report)


def _descend(
    run: _Run,
    learner: Learner,
    settings: LearningSettings,
    seed: int,
) -> DescentReport:
    batches = Batches(len(run.data.inputs), settings.batch, seed + run.index)

    def training_loss() -> Tensor:
        return run.loss(learner.rows.to_weights(learner(run.dtype)))

    def held_out_loss() -> float:
        with torch.no_grad():
            return run.held_out_loss(learner.rows.to_weights(learner(run.dtype)))

    return descend(
        learning_rates(learner, settings),
        lambda step: run.draw(batches.at(step)),
        training_loss,
        held_out_loss,
        settings.descent(len(run.data.inputs)),
        record=settings.record and run.is_static and not len(run.data.inputs) % settings.batch,
    )


class Batches:
    """Sequence numbers of each step: a new seeded permutation every epoch."""

    def __init__(self, sequences: int, batch: int, seed: int) -> None:
        self._sequences, self._batch = sequences, batch
        self._generator = torch.Generator().manual_seed(seed)
        self._queue: list[Tensor] = []

    def at(self, step: int) -> Tensor:
        """i64 [B] of the next step; steps are asked for in order."""
        if not self._queue:
            order = torch.randperm(self._sequences, generator=self._generator)
            self._queue = list(order.split(self._batch))
        return self._queue.pop(0)


class _Run:
    """The forward pass of one block with given weights, and its error."""

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        block: nn.Module,
        slots: Mapping[str, LearnableLinear],
        data: BlockData,
        metric: OutputMetric,
    ) -> None:
        self.model, self.index, self.block = model, index, block
        self.slots, self.data, self.metric = slots, data, metric
        self.dtype = product_dtype(model)
        self._batch: Tensor | None = None

    @property
    def is_static(self) -> bool:
        """Whether every step runs the same kernels: data on the device, no routing of tokens."""
        inputs = self.data.inputs
        return inputs.device.type == self.model.device.type and not self.model.plan.experts

    def draw(self, batch: Tensor) -> None:
        """Choose calibration sequences i64 [B] for `loss`."""
        if self._batch is None or len(self._batch) != len(batch):
            self._batch = batch.to(self.data.inputs.device)
        else:
            self._batch.copy_(batch)

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Error on the sequences drawn, times a factor that keeps fp16 gradients in range."""
        assert self._batch is not None
        set_slots(self.slots, weights)
        inputs = self.data.inputs.index_select(0, self._batch)
        error = self._error(inputs, self.data.targets.index_select(0, self._batch))
        return error * loss_scale(self.dtype, inputs.shape[0] * inputs.shape[1])

    @torch.no_grad()
    def held_out_loss(self, weights: Mapping[str, Tensor]) -> float:
        """Mean error over the held-out sequences."""
        set_slots(self.slots, {name: w.to(self.dtype) for name, w in weights.items()})
        return self._mean_error(self.data.held_out_inputs, self.data.held_out_targets)

    @torch.no_grad()
    def text_losses(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean error over the sequences of each text that is only measured."""
        set_slots(self.slots, {name: w.to(self.dtype) for name, w in weights.items()})
        return {name: self._mean_error(*pair) for name, pair in self.data.texts.items()}

    def _mean_error(self, inputs: Tensor, targets: Tensor) -> float:
        pairs = zip(inputs.split(HELD_OUT_BATCH), targets.split(HELD_OUT_BATCH), strict=True)
        errors = [self._error(x, t) * len(x) for x, t in pairs]
        return float(torch.stack(errors).sum()) / len(inputs)

    def _error(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with mixed_precision(self.model):
            output = self.model.run_block(self.index, self.block, inputs.to(self.model.device))
        return self.metric(output, targets.to(self.model.device))


def set_slots(slots: Mapping[str, LearnableLinear], weights: Mapping[str, Tensor]) -> None:
    """Put weights [N, K] into a block's learnable linears."""
    for name, weight in weights.items():
        slots[name].weight = weight


def loss_scale(dtype: torch.dtype, tokens: int) -> float:
    """Factor that keeps gradients of a mean over tokens inside fp16; Adam does not feel it."""
    return float(tokens) if dtype == torch.float16 else 1.0


def _resident(data: BlockData, device: torch.device) -> BlockData:
    """The data on the device, where it fits."""
    tensors = (data.inputs, data.targets, data.held_out_inputs, data.held_out_targets)
    inputs, targets, held_out_inputs, held_out_targets = resident(tensors, device)
    return BlockData(inputs, targets, held_out_inputs, held_out_targets, data.texts)


def resident(tensors: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The tensors on a GPU, where they take no more than a quarter of its free memory."""
    if device.type != "cuda":
        return tensors
    size = sum(tensor.nbytes for tensor in tensors if tensor.device.type != device.type)
    if size > RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
        return tensors
    return tuple(tensor.to(device) for tensor in tensors)


@torch.no_grad()
def _augmented(
    model: StreamedModel, index: int, float_block: nn.Module, data: BlockData
) -> BlockData:
    """Targets averaged with the float block's outputs on the quantized prefix's outputs."""

    def mean(inputs: Tensor, targets: Tensor) -> Tensor:
        parts = []
        for x, t in zip(inputs.split(HELD_OUT_BATCH), targets.split(HELD_OUT_BATCH), strict=True):
            with mixed_precision(model):
                y = model.run_block(index, float_block, x.to(model.device))
            parts.append(((y.float() + t.to(y.device).float()) / 2).to(t.device, t.dtype))
        return torch.cat(parts)

    return BlockData(
        data.inputs,
        mean(data.inputs, data.targets),
        data.held_out_inputs,
        mean(data.held_out_inputs, data.held_out_targets),
        {name: (inputs, mean(inputs, targets)) for name, (inputs, targets) in data.texts.items()},
    )
