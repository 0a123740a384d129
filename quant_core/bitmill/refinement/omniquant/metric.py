"""How the error of a decoder block's output is measured while the block is learned.

    plain:   mean over tokens and channels of (y - t)^2                         (OmniQuant)
    fisher:  mean over tokens of |(y - t) R|^2 / mean(t^2),    R R^T = F / mean(diag F)
             F = (1 - shrink) E[n g g^T] + shrink * mean(diag) * I,   g = dL/dy,   n = mean(y^2)

The residual stream has a few tokens and channels a thousand times larger than the rest; a plain
error sees little else. The next norm divides each token by its own size, so errors count relative
to it, and the gradient g of the model's loss says which directions of the stream are read later on.
With labels drawn from the model's own predictions E[g g^T] is the Fisher matrix, the curvature of
the KL divergence that quantization causes. `shrink` keeps a share of plain error: at 2 bits errors
are not small, and directions that look free to first order are not.

One backward pass over a few sequences measures F for all blocks, one block on the device at a time.
Given up: a curvature per token or across blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.calibration.hooks import batches, embed_windows, run_windows
from bitmill.errors import CalibrationError
from bitmill.models.dtypes import mixed_precision
from bitmill.models.streamed import StreamedModel
from bitmill.runtime.process import deterministic

TINY = 1e-12


@dataclass(frozen=True, eq=False)
class OutputMetric:
    """`root` f32 [D, D] for the fisher error, None for the plain one."""

    root: Tensor | None = None

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean error, a scalar f32, of outputs [B, T, D] against targets [B, T, D]."""
        target = target.float()
        error = output.float() - target
        if self.root is None:
            return error.square().mean()
        size = target.square().mean(-1, keepdim=True).clamp(min=TINY)
        relative = error * size.rsqrt()
        return (relative.to(output.dtype) @ self.root.to(output.dtype)).float().square().mean()

    def to(self, device: torch.device) -> OutputMetric:
        """The same metric with its root on `device`."""
        return OutputMetric(None if self.root is None else self.root.to(device))


def fisher_metric(moment: Tensor, shrink: float) -> OutputMetric:
    """The fisher error of a gradient moment E[n g g^T] f32 [D, D].

    Raises CalibrationError if the moment is not finite.
    """
    if not bool(torch.isfinite(moment).all()):
        raise CalibrationError(
            "the gradients of the calibration text are not finite: use block_error 'plain' or run "
            "the model in a wider dtype",
            code="non_finite_gradients",
        )
    mean = moment.diagonal().mean()
    eye = torch.eye(len(moment), device=moment.device)
    scaled = torch.where(mean > 0, moment / mean.clamp(min=1e-38), eye)
    values, vectors = torch.linalg.eigh((1 - shrink) * scaled + shrink * eye)
    return OutputMetric(vectors * values.clamp(min=0.0).sqrt())


def gradient_moments(
    model: StreamedModel,
    tokens: Tensor,
    *,
    seed: int,
    batch: int = 2,
    on_block: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """E[n g g^T] f32 [D, D] on the CPU at the output of every block of the float model.

    tokens: i64 [S, T]. Host memory: the inputs of all blocks for these S sequences.
    """
    inputs = _block_inputs(model, tokens, batch)
    gradient = _head_gradients(model, inputs.pop(), seed=seed, batch=batch)
    moments = []
    for index in reversed(range(model.block_count)):
        block = model.load_block(index).requires_grad_(False)
        moment, parts = None, []
        hidden = inputs.pop()
        for part in batches(len(tokens), batch):
            x = hidden[part].to(model.device).requires_grad_()
            g = gradient[part].to(model.device)
            with deterministic(), torch.enable_grad(), mixed_precision(model):
                y = model.run_block(index, block, x)
                [received] = torch.autograd.grad(y, x, g.to(y.dtype))
            update = _moment(y.detach(), g)
            moment = update if moment is None else moment + update
            parts.append(received.cpu())
        gradient = torch.cat(parts)
        assert moment is not None
        moments.append((moment / tokens.numel()).cpu())
        if on_block:
            on_block(index)
    return moments[::-1]


def _block_inputs(model: StreamedModel, tokens: Tensor, batch: int) -> list[Tensor]:
    """The input of every block [S, T, D] on the CPU, and last the output of the last block."""
    with mixed_precision(model):
        stream = [embed_windows(model, tokens, batch=batch)]
        for index in range(model.block_count):
            block = model.load_block(index)
            stream.append(run_windows(model, index, block, stream[-1], batch=batch))
    return stream


def _head_gradients(model: StreamedModel, hidden: Tensor, *, seed: int, batch: int) -> Tensor:
    """Gradient [S, T, D] of the summed loss with labels drawn from the model's own predictions."""
    generator = torch.Generator(model.device).manual_seed(seed)
    parts = []
    for part in hidden.split(batch):
        x = part.to(model.device).requires_grad_()
        with torch.enable_grad(), mixed_precision(model):
            logits = model.logits(x).float().flatten(0, -2)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 0], reduction="sum")
        parts.append(torch.autograd.grad(loss, x)[0].cpu())
    return torch.cat(parts)


def _moment(y: Tensor, g: Tensor) -> Tensor:
    """Sum over tokens of n g g^T, f32 [D, D], n = mean(y^2) of the token."""
    size = y.float().square().mean(-1, keepdim=True).sqrt()
    weighted = (g.float() * size).flatten(0, -2)
    return weighted.t() @ weighted
