"""KL divergence between softmaxes, row by row, from how far the second one's logits have moved.

    KL(softmax(y) || softmax(y + d)) = log sum_i p_i exp(d_i) - sum_i p_i d_i      p = softmax(y)

Both terms are as small as d, so a small divergence is not lost between large logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill_kernels.backend import resolve_backend


def divergence(source: Tensor, change: Tensor, *, backend: str = "auto") -> Tensor:
    """f32 [T], nats: source f32 [T, N] holds log-softmaxes of y, change f32 [T, N] is d."""
    if source.shape != change.shape or source.dim() != 2:
        raise ValueError(
            f"source is {tuple(source.shape)}, change {tuple(change.shape)}: give both as [T, N]"
        )
    if resolve_backend(backend, change.device) == "triton":
        from bitmill_kernels.divergence.divergence_triton import divergence_triton

        return divergence_triton(source.contiguous(), change.contiguous())
    return torch.logsumexp(source + change, 1) - (source.exp() * change).sum(1)
