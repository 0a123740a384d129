"""Rotary position embeddings of queries and keys, read and written once.

The first r of d columns are turned, column j with column j + r / 2, the others are passed on:

    y1 = x1 cos1 - x2 sin1      y2 = x2 cos2 + x1 sin2          (1 and 2: halves of the r columns)

in fp32, rounded once. The gradient is the transposed turn, the same with other sines:

    dx1 = dy1 cos1 + dy2 sin2   dx2 = dy2 cos2 - dy1 sin1

Given up: gradients of the angles, and pairs of neighbouring columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitmill_kernels.backend import resolve_backend


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, d] and k [B, Hk, T, d], floats of any strides, turned; differentiable in both.

    cos, sin: [B or 1, T, r] with an even r <= d; their gradients are not computed.
    The kernel's answers lie in memory in the order of q and k.
    """
    if not fits(q, k, cos, sin):
        shapes = [tuple(x.shape) for x in (q, k, cos, sin)]
        raise ValueError(
            f"queries, keys, cosines and sines are {shapes}: give [B, H, T, d], [B, Hk, T, d] and "
            "twice [B or 1, T, r]"
        )
    cos, sin = cos.detach(), sin.detach()
    if resolve_backend(backend, q.device) == "triton" and q.dtype.itemsize <= 4:
        answer: tuple[Tensor, Tensor] = _Rotation.apply(q, k, cos, sin, False)
        return answer
    return _turned(q, cos, sin), _turned(k, cos, sin)


def fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes tensors of these shapes."""
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    B, _, T, d = q.shape
    turned = cos.shape[2]
    same = (k.shape[0], *k.shape[2:]) == (B, T, d) and cos.shape[1] == T
    return same and cos.shape[0] in (1, B) and turned % 2 == 0 and 0 < turned <= d


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The obvious version."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = cos.shape[-1]
    wide = x[..., :turned].to(torch.promote_types(x.dtype, torch.float32))
    one, two = wide.chunk(2, dim=-1)
    y = (wide * cos + torch.cat((-two, one), dim=-1) * sin).to(x.dtype)
    return y if turned == x.shape[-1] else torch.cat((y, x[..., turned:]), dim=-1)


class _Rotation(torch.autograd.Function):
    """The kernel; its gradient is the kernel turning back."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool
    ) -> tuple[Tensor, Tensor]:
        from bitmill_kernels.rotary.rotary_triton import rotate_triton

        ctx.save_for_backward(cos, sin)
        ctx.back = back
        return rotate_triton(q, k, cos, sin, back)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = _Rotation.apply(*gradients, cos, sin, not ctx.back)
        return dq, dk, None, None, None
