"""End-to-end tuning of what is continuous in a quantized model, against the float model's logits.

    minimize over the scales   KL(float || quantized),  mean nats per token;   codes, zeros frozen

(EfficientQAT, arXiv 2407.11062, section 3.3, with the float model's logits in place of labels.)
Block-wise learning makes every block answer for its own error; this step lets errors of different
blocks cancel, and is the first to see the loss that counts. There are few numbers to learn, so 50
to 150 steps on the calibration text suffice and do not overfit easily. What they are is the code's
matter (`Tunable`).

Every block's codes stay on the device (a byte a weight of affine codes, two of trellis values), its
linears are restored inside the forward pass, and each block is recomputed in the backward pass:
activations of one block at a time.
The float model runs once, block by block; its last hidden states are what is remembered of it, and
logits of both models exist for `CHUNK` tokens at a time. Given up: training under a host or device
memory that cannot hold one byte per weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitmill.calibration.hooks import embed_windows, run_windows
from bitmill.models.dtypes import mixed_precision, product_dtype
from bitmill.models.streamed import StreamedModel
from bitmill.quant.tensors import Quantized, QuantizedWeight, affine
from bitmill.quant.trellis import TrellisTensor
from bitmill.refinement.omniquant.adam import DescentReport, DescentSettings, Rate, descend
from bitmill.refinement.omniquant.block import (
    HELD_OUT_BATCH,
    Batches,
    loss_scale,
    resident,
    set_slots,
)
from bitmill.refinement.omniquant.rounding import SMALLEST_RATIO, straight_half
from bitmill.refinement.omniquant.rows import BlockRows, LearnableLinear, attach
from bitmill.refinement.omniquant.trellis_scales import TrellisScales
from bitmill.refinement.vectors import LearnedVectors, restore_vectors
from bitmill.results import TuningQuality
from bitmill.runtime.process import deterministic

CHUNK = 2048
"""Tokens whose logits exist at a time."""


@dataclass(frozen=True)
class TuneSettings:
    """Steps, sequences per step and the rate of scales, relative to themselves.

    vector_rate: that of norms and biases, in units of a vector's root mean square; 0 leaves them.
    """

    steps: int = 150
    batch: int = 4
    scale_rate: float = 1e-3
    evaluations: int = 12
    vector_rate: float = 0.0


class Tunable(Protocol):
    """What is learned of one block's linears, in units of itself."""

    @property
    def ratios(self) -> list[nn.Parameter]:
        """What moves, at one rate."""

    def weights(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Weights [N, K] in the source's columns, differentiable."""

    def export(self) -> Mapping[str, Quantized]:
        """What would be stored now, on the CPU."""


class LearnedScales(nn.Module):
    """One block's scales as ratio f32 [R, 1] of their start; codes u8 [R, 128] are frozen."""

    def __init__(self, rows: BlockRows, starts: Mapping[str, QuantizedWeight]) -> None:
        super().__init__()
        self.rows = rows
        self.scale0, self.zero = rows.of_grids(starts)
        self.codes = rows.of_codes(starts)
        self.ratio = nn.Parameter(torch.ones_like(self.scale0))

    @property
    def ratios(self) -> list[nn.Parameter]:
        """All of them."""
        return [self.ratio]

    def scale(self) -> Tensor:
        """f32 [R, 1], exact in fp16, differentiable."""
        return straight_half(self.scale0 * self.ratio.clamp(min=SMALLEST_RATIO))

    def weights(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Weights [N, K] in the source's columns, computed in f32 and cast once."""
        rows = (self.scale() * (self.codes.float() - self.zero)).to(dtype)
        return self.rows.to_weights(rows)

    @torch.no_grad()
    def export(self) -> dict[str, QuantizedWeight]:
        """What would be stored now, on the CPU."""
        return self.rows.export(self.codes.float(), self.scale(), self.zero)


@dataclass(frozen=True, eq=False)
class TunedModel:
    """weights: of every quantized linear. vectors: norms and biases that changed, by their names in
    the module tree. report: how it went."""

    weights: Mapping[str, Quantized]
    vectors: Mapping[str, Tensor]
    report: TuningQuality


def tune_scales(
    model: StreamedModel,
    weights: Mapping[str, Quantized],
    tokens: Tensor,
    held_out: Tensor,
    settings: TuneSettings,
    *,
    seed: int,
    matrices: Mapping[str, Tensor] | None = None,
    vectors: Mapping[str, Tensor] | None = None,
    texts: Mapping[str, Tensor] | None = None,
) -> TunedModel:
    """The whole model tuned, or `weights` themselves where held-out KL does not fall.

    weights: of every quantized linear. tokens i64 [S, T], held_out i64 [S2, T]. matrices: the
    dequantized embeddings and heads of the tuned model; they stay as they are. vectors: its norms
    and biases that are not the source's, by their names in the module tree. texts: windows
    i64 [S3, T3] of other texts, whose KL is reported and decides nothing.
    """
    with deterministic():
        student = _Student(model, weights, matrices or {}, vectors or {}, settings.vector_rate > 0)
        lesson = _Lesson(student, tokens, held_out, settings.batch, seed)
        watched = {name: (t, final_hidden(model, t)) for name, t in (texts or {}).items()}
        before = {name: student.mean_kl(*pair) for name, pair in watched.items()}
        report = descend(
            student.rates(settings),
            lesson.draw,
            lesson.training_loss,
            lesson.held_out_loss,
            DescentSettings(
                settings.steps,
                max(1, settings.steps // settings.evaluations),
                warmup=settings.steps // 20,
            ),
        )
        kept = report.after < report.before
        after = {name: student.mean_kl(*pair) for name, pair in watched.items()} if kept else before
    quality = _report(report, kept, {name: (before[name], after[name]) for name in before})
    if not kept:
        return TunedModel(weights, {}, quality)
    return TunedModel(*student.export(), quality)


def _report(
    descent: DescentReport, kept: bool, texts: dict[str, tuple[float, float]]
) -> TuningQuality:
    return TuningQuality(
        kl_before=descent.before,
        kl_after=descent.after,
        kept=kept,
        texts=texts,
        steps=descent.steps,
        best_step=descent.best_step,
        rollbacks=descent.rollbacks,
        gave_up=descent.gave_up,
        seconds=descent.seconds,
        curve=tuple(descent.curve),
    )


def final_hidden(model: StreamedModel, tokens: Tensor) -> Tensor:
    """Output of the float model's last block [S, T, D], block by block.

    On the device where that takes little of its memory, else on the CPU.
    """
    with mixed_precision(model):
        on_host = embed_windows(model, tokens, batch=HELD_OUT_BATCH)
        [hidden] = resident((on_host,), model.device)
        for index in range(model.block_count):
            block = model.load_block(index)
            run_windows(model, index, block, hidden, batch=HELD_OUT_BATCH, out=hidden)
    return hidden


class _Lesson:
    """The float model's last hidden states and which sequences come next."""

    def __init__(
        self, student: _Student, tokens: Tensor, held_out: Tensor, batch: int, seed: int
    ) -> None:
        model = student.model
        self._student, self._tokens, self._held_out = student, tokens, held_out
        self._teacher = final_hidden(model, tokens)
        self._held_out_teacher = final_hidden(model, held_out)
        self._batches = Batches(len(tokens), batch, seed)
        self._batch = torch.arange(0)

    def draw(self, step: int) -> None:
        """Choose the sequences of a step."""
        self._batch = self._batches.at(step)

    def training_loss(self) -> Tensor:
        """Mean KL of the drawn sequences, times a factor that keeps fp16 gradients in range."""
        tokens = self._tokens[self._batch]
        kl = self._student.kl(tokens, self._teacher[self._batch])
        return kl * loss_scale(self._student.dtype, tokens.numel())

    def held_out_loss(self) -> float:
        """Mean KL over the held-out sequences."""
        return self._student.mean_kl(self._held_out, self._held_out_teacher)


def tunable(starts: Mapping[str, Quantized], device: torch.device) -> Tunable:
    """What is learned of linears of one kind. Raises FormatError where kinds are mixed."""
    coded = {name: w for name, w in starts.items() if isinstance(w, TrellisTensor)}
    if coded and len(coded) == len(starts):
        return TrellisScales(coded, device)
    grids = affine(starts)
    return LearnedScales(BlockRows(grids, device), grids)


class _Student:
    """All blocks of the quantized model on the device, with what is learned of them."""

    def __init__(
        self,
        model: StreamedModel,
        weights: Mapping[str, Quantized],
        matrices: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor],
        learns_vectors: bool,
    ) -> None:
        self.model, self.dtype = model, product_dtype(model)
        self.outside = model.with_matrices(matrices)
        self.blocks: list[nn.Module] = []
        self.slots: list[dict[str, LearnableLinear]] = []
        self.learners: list[Tunable] = []
        self.vectors: list[LearnedVectors] = []
        for index in range(model.block_count):
            block = model.load_block(index)
            restore_vectors(model, index, block, vectors)
            linears = model.linears(block, index)
            starts = {name: weights[name] for name in linears}
            self.learners.append(tunable(starts, model.device))
            slots, _ = attach(block, linears)
            if learns_vectors:
                self.vectors.append(LearnedVectors(model, index, block))
            self.blocks.append(block)
            self.slots.append(slots)

    def rates(self, settings: TuneSettings) -> list[Rate]:
        """Everything that moves."""
        ratios = [ratio for learner in self.learners for ratio in learner.ratios]
        rates = [Rate(ratios, settings.scale_rate)]
        offsets = [offset for one in self.vectors for offset in one.offsets]
        return [*rates, Rate(offsets, settings.vector_rate)] if offsets else rates

    def export(self) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
        """Every linear, and the vectors that changed, as they would be stored now."""
        weights = {name: w for learner in self.learners for name, w in learner.export().items()}
        return weights, {name: v for one in self.vectors for name, v in one.export().items()}

    def kl(self, tokens: Tensor, teacher: Tensor) -> Tensor:
        """Mean KL per token, a scalar f32; teacher: the float model's `final_hidden` of tokens."""
        with mixed_precision(self.model):
            hidden = self.outside.embed(tokens.to(self.model.device))
            for index in range(self.model.block_count):
                hidden = self._checkpointed(self._block, index, hidden)
            x, t = hidden.flatten(0, 1)[None], teacher.flatten(0, 1)[None].to(hidden)
            chunks = zip(x.split(CHUNK, 1), t.split(CHUNK, 1), strict=True)
            parts = [self._checkpointed(self._chunk_kl, a, b) for a, b in chunks]
        return torch.stack(parts).sum() / tokens.numel()

    @torch.no_grad()
    def mean_kl(self, tokens: Tensor, teacher: Tensor) -> float:
        """Mean KL per token over sequences i64 [S, T], a few at a time."""
        pairs = zip(tokens.split(HELD_OUT_BATCH), teacher.split(HELD_OUT_BATCH), strict=True)
        total = torch.stack([self.kl(t, h) * len(t) for t, h in pairs]).sum()
        return float(total) / len(tokens)

    def _checkpointed(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*inputs)
        result: Tensor = checkpoint(
            function, *inputs, use_reentrant=False, preserve_rng_state=False
        )
        return result

    def _block(self, index: int, hidden: Tensor) -> Tensor:
        set_slots(self.slots[index], self.learners[index].weights(self.dtype))
        if self.vectors:
            self.vectors[index].install()
        try:
            return self.model.run_block(index, self.blocks[index], hidden)
        finally:
            for slot in self.slots[index].values():
                slot.weight = None

    def _chunk_kl(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Summed KL of one chunk's next-token distributions, from hidden states [1, C, D]."""
        with torch.no_grad():
            target = self.model.logits(teacher).float().log_softmax(-1)
        predicted = self.outside.logits(student).float().log_softmax(-1)
        return (target.exp() * (target - predicted)).sum()
