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

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitmill.block_rows import BlockRows, LearnableLinear, learnable
from bitmill.blocks import StreamedModel, set_weight, weight_of
from bitmill.descent import DescentReport, descend
from bitmill.errors import CalibrationError
from bitmill.omniquant import (
    Learner,
    LearningSettings,
    learned_tensors,
    learning_rates,
    make_learner,
    restore,
)
from bitmill.output_metric import OutputMetric, mixed_precision
from bitmill.packed import QuantizedWeight

HELD_OUT_BATCH = 4
RESIDENT_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class BlockData:
    """Inputs from the quantized prefix and float targets, [S, T, D] each, on any device."""

    inputs: Tensor
    targets: Tensor
    held_out_inputs: Tensor
    held_out_targets: Tensor


@dataclass(frozen=True)
class BlockLearningReport:
    """What learning did to one block; losses are held-out, `kept` says what the block has now."""

    index: int
    mode: str
    loss_before: float
    loss_after: float
    kept: Literal["learned", "start", "resumed"]
    seconds: float
    steps: int = 0
    best_step: int = 0
    rollbacks: int = 0
    gave_up: bool = False
    recorded: bool = False
    curve: list[tuple[int, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class LearnedBlock:
    """The result: weights as kept, what to store for a later `restore`, and the report."""

    weights: dict[str, QuantizedWeight]
    tensors: dict[str, Tensor]
    report: BlockLearningReport


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
    should_stop: Callable[[], None] | None = None,
) -> LearnedBlock:
    """Learn block `index`, starting from `starts` (full name -> weights, e.g. GPTQ's).

    block: a loaded copy of the block; on return its linears hold the kept weights. metric: the
    block's fisher error, None for the plain one. Float weights are read from the model again.
    """
    began = time.perf_counter()
    if not len(data.held_out_inputs):
        raise CalibrationError(
            "learning has no held-out sequences to choose by: set calibration.held_out above 0",
            code="no_held_out",
            param="calibration.held_out",
        )
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
        before = run.held_out_loss(learner.rows.dequantize(starts))
        descent = _descend(run, learner, settings, seed, should_stop)
        exported = learner.export()
        after = run.held_out_loss(learner.rows.dequantize(exported))
    improved = after < before
    kept = exported if improved else dict(starts)
    for name, weight in learner.rows.dequantize(kept).items():
        set_weight(linears[name], weight)
    tensors = learned_tensors(learner if improved else None, kept)
    report = BlockLearningReport(
        index=index,
        mode=settings.mode,
        loss_before=before,
        loss_after=after if improved else before,
        kept="learned" if improved else "start",
        steps=descent.steps,
        best_step=descent.best_step,
        rollbacks=descent.rollbacks,
        gave_up=descent.gave_up,
        recorded=descent.recorded,
        seconds=time.perf_counter() - began,
        curve=descent.curve,
    )
    return LearnedBlock(kept, tensors, report)


def apply_learned(
    model: StreamedModel,
    index: int,
    block: nn.Module,
    starts: Mapping[str, QuantizedWeight],
    tensors: Mapping[str, Tensor],
    data: BlockData,
    *,
    mode: str,
    metric: OutputMetric | None = None,
) -> LearnedBlock:
    """Put stored learned parameters into a block and measure them; nothing is trained.

    Raises FormatError where they belong to another model or map.
    """
    began = time.perf_counter()
    linears = model.linears(block, index)
    float_linears = model.linears(model.load_block(index), index)
    source = {name: weight_of(module) for name, module in float_linears.items()}
    weights = restore(tensors, starts, source, model.device)
    with learnable(block, linears) as slots:
        run = _Run(model, index, block, slots, data, (metric or OutputMetric()).to(model.device))
        rows = BlockRows(starts, model.device)
        before, after = (run.held_out_loss(rows.dequantize(w)) for w in (starts, weights))
    for name, weight in rows.dequantize(weights).items():
        set_weight(linears[name], weight)
    report = BlockLearningReport(
        index=index,
        mode=mode,
        loss_before=before,
        loss_after=after,
        kept="resumed",
        seconds=time.perf_counter() - began,
    )
    return LearnedBlock(weights, dict(tensors), report)


def _descend(
    run: _Run,
    learner: Learner,
    settings: LearningSettings,
    seed: int,
    should_stop: Callable[[], None] | None,
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
        should_stop=should_stop,
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
        self.dtype = compute_dtype(model)
        self._batch: Tensor | None = None

    @property
    def is_static(self) -> bool:
        """Whether every step runs the same kernels: data on the device, no routing of tokens."""
        return self.data.inputs.device == self.model.device and not self.model.plan.experts

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
        pairs = zip(
            self.data.held_out_inputs.split(HELD_OUT_BATCH),
            self.data.held_out_targets.split(HELD_OUT_BATCH),
            strict=True,
        )
        errors = [self._error(x, t) * len(x) for x, t in pairs]
        return float(torch.stack(errors).sum()) / len(self.data.held_out_inputs)

    def _error(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with mixed_precision(self.model):
            output = self.model.run_block(self.index, self.block, inputs.to(self.model.device))
        return self.metric(output, targets.to(self.model.device))


def set_slots(slots: Mapping[str, LearnableLinear], weights: Mapping[str, Tensor]) -> None:
    """Put weights [N, K] into a block's learnable linears."""
    for name, weight in weights.items():
        slots[name].weight = weight


def compute_dtype(model: StreamedModel) -> torch.dtype:
    """The dtype of matrix products: bf16 on a GPU for a model in f32, else the model's own."""
    mixed = model.device.type == "cuda" and model.dtype == torch.float32
    return torch.bfloat16 if mixed else model.dtype


def loss_scale(dtype: torch.dtype, tokens: int) -> float:
    """Factor that keeps gradients of a mean over tokens inside fp16; Adam does not feel it."""
    return float(tokens) if dtype == torch.float16 else 1.0


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels within, where the process set CUBLAS_WORKSPACE_CONFIG for them."""
    switches: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    possible = not torch.cuda.is_available() or "CUBLAS_WORKSPACE_CONFIG" in os.environ
    torch.use_deterministic_algorithms(before[0] or possible)
    switches.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        switches.fill_uninitialized_memory = before[1]


def _resident(data: BlockData, device: torch.device) -> BlockData:
    """The data on the device, where it fits."""
    tensors = (data.inputs, data.targets, data.held_out_inputs, data.held_out_targets)
    return BlockData(*resident(tensors, device))


def resident(tensors: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The tensors on a GPU, where they take no more than a quarter of its free memory."""
    if device.type != "cuda":
        return tensors
    size = sum(tensor.nbytes for tensor in tensors if tensor.device != device)
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
    )
