"""Scales, zero points and roundings of a block as learnable parameters.

    w = s (q - z),   q = clamp(round(p + z), 0, 2^b - 1)
    s = fp16(s0 * ratio),   z = the nearest storable zero point

p is the position of a weight in codes, relative to its zero point. It starts from a quantized
weight (usually GPTQ's), at the code or beside it, so that the first forward pass gives the starting
codes exactly. Learning p is learning the weight before rounding, which measured best among what
block-wise training can learn (EfficientQAT, arXiv 2407.11062, section 3.2 and its ablation), in
steps of the grid instead of in weights, so that one learning rate suits every width and every row.

Gradients go straight through the roundings. A code at the end of its range lets through only the
gradients that pull it back inside. The gradient of s is exact for the codes of the moment; the one
of z counts the codes beyond the range, and at width 1, where z may move without the codes, all.

Only codes, scales and zero points are kept in the end: the same storage as GPTQ's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.quant.grid import FP16_MAX
from bitmill.quant.tensors import QuantizedWeight
from bitmill.refinement.omniquant.rows import BlockRows
from bitmill.refinement.straight import straight

RESIDUAL = 0.49
"""How far from its code a position may start; 0.5 would round to the next one."""

SMALLEST_RATIO = 0.05


class LearnedRounding(nn.Module):
    """Parameters of one block: position f32 [R, 128], ratio and zero f32 [R, 1].

    `roundings=False` freezes the positions: only scales and zero points are learned.
    """

    def __init__(
        self,
        rows: BlockRows,
        starts: Mapping[str, QuantizedWeight],
        weights: Mapping[str, Tensor],
        *,
        roundings: bool = True,
    ) -> None:
        super().__init__()
        self.rows = rows
        self.scale0, zero = rows.of_grids(starts)
        codes = rows.of_codes(starts)
        position = start_positions(codes, rows.of_weights(weights), self.scale0, zero, rows.largest)
        self.position = nn.Parameter(position, requires_grad=roundings)
        self.ratio = nn.Parameter(torch.ones_like(self.scale0))
        self.zero = nn.Parameter(zero)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point f32 [R, 1], both storable, differentiable."""
        scale = straight_half(self.scale0 * self.ratio.clamp(min=SMALLEST_RATIO))
        return scale, straight_zero(self.zero, self.rows)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Weights [R, 128] in `dtype`, computed in f32 and cast once."""
        scale, zero = self.grid()
        return rounded(self.position, scale, zero, self.rows.largest, self.rows.one_bit, dtype)

    @torch.no_grad()
    def export(self) -> dict[str, QuantizedWeight]:
        """What would be stored now, on the CPU."""
        scale, zero = self.grid()
        return self.rows.export(_codes(self.position, zero, self.rows.largest), scale, zero)


def start_positions(
    codes: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, largest: Tensor
) -> Tensor:
    """Positions f32 [R, 128] that round to `codes`, on the side where the float weights lie.

    Within half a step the position is the weight's own. A code further away was chosen to make up
    for other columns: its position goes back to the middle as the distance grows to one step, so
    that the first steps do not undo the choice. A code at the end of its range keeps the weight's
    position beyond it, which tells the zero point on which side weights are cut off.
    """
    exact = torch.where(scale > 0, weight / scale, 0.0)
    centre = codes.float() - zero
    residual = (exact - centre).nan_to_num(0.0)
    outward = ((codes == 0) & (residual < 0)) | ((codes == largest) & (residual > 0))
    distance = residual.abs()
    folded = torch.minimum(distance, 1 - distance).clamp(0.0, RESIDUAL)
    beyond = torch.minimum(distance, largest)
    return centre + torch.where(outward, beyond, folded) * residual.sign()


def rounded(
    position: Tensor,
    scale: Tensor,
    zero: Tensor,
    largest: Tensor,
    one_bit: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """s (clamp(round(p + z)) - z) with the gradients of the module's docstring.

    position f32 [R, C]; scale, zero, largest f32 [R, 1]; one_bit bool [R, 1]; result in `dtype`.
    """
    weight: Tensor = _Rounded.apply(position, scale, zero, largest, one_bit, dtype)
    return weight


def straight_round(x: Tensor) -> Tensor:
    """round(x) whose gradient is that of x."""
    return x + (x.round() - x).detach()


def straight_half(x: Tensor) -> Tensor:
    """x >= 0 rounded to the nearest that fp16 has, 65504 at most, with the gradient of x."""
    return straight(x, x.clamp(max=FP16_MAX).half().float())


def straight_zero(zero: Tensor, rows: BlockRows) -> Tensor:
    """The nearest storable zero points f32 [R, 1], with the gradient of `zero`."""
    nearest = torch.minimum((zero / rows.zero_step).round() * rows.zero_step, rows.zero_top)
    return straight(zero, nearest.clamp(min=0.0))


def _codes(position: Tensor, zero: Tensor, largest: Tensor) -> Tensor:
    return torch.minimum((position + zero).round_().clamp_(min=0.0), largest)


class _Rounded(torch.autograd.Function):
    """`rounded`, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        position: Tensor,
        scale: Tensor,
        zero: Tensor,
        largest: Tensor,
        one_bit: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(position, scale, zero, largest, one_bit)
        return _codes(position, zero, largest).sub_(zero).mul_(scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        position, scale, zero, largest, one_bit = ctx.saved_tensors
        grad = grad.float()
        raw = (position + zero).round_()
        below, above = raw < 0, raw > largest
        offset = torch.minimum(raw.clamp_(min=0.0), largest).sub_(zero)
        grad_scale = (grad * offset).sum(1, keepdim=True)
        steps = grad.mul(scale)
        outside = below | above
        grad_zero = -torch.where(outside | one_bit, steps, 0.0).sum(1, keepdim=True)
        stuck = (below & (steps > 0)) | (above & (steps < 0))
        grad_position = steps.masked_fill_(stuck, 0.0) if ctx.needs_input_grad[0] else None
        return grad_position, grad_scale, grad_zero, None, None, None
