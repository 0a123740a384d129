"""Closed-form refit of the scales with all codes frozen.

    s_g += (R H_{:,g} v_g) / (v_g^T H_gg v_g)      v = q - z, R = W - ŵ, per row

is the exact minimum of tr(R H R^T) along one (row, group) scale. Groups are swept in turn
(Gauss-Seidel) and R H is kept up to date by one product per group. A new scale is rounded to fp16
first and taken only if the rounded one lowers the error, so the error never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.quant.codes import LinearCodes
from bitmill.quant.grid import FP16_MAX


def refit_scales(W: Tensor, codes: LinearCodes, H: Tensor, *, sweeps: int = 2) -> LinearCodes:
    """New scales for frozen codes: W f32 [N, K] is the target, H f32 [K, K], both in packed order.

    Never increases tr((W - ŵ) H (W - ŵ)^T). Scales stay positive; a scale of 0 stays 0.
    """
    scales = codes.scales.clone()
    gradient = (W - codes.values()) @ H
    for _ in range(sweeps):
        for group, part in codes.groups():
            v = codes.codes[:, part].float() - codes.zeros[group, :, None]
            slope = (gradient[:, part] * v).sum(1)
            curvature = ((v @ H[part, part]) * v).sum(1)
            step = rounded_step(scales[group], slope, curvature)
            scales[group] += step
            gradient -= (step[:, None] * v) @ H[part]
    return LinearCodes(codes.codes, scales, codes.zeros, codes.widths)


def rounded_step(scale: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    """Each scale's change to the fp16 value nearest its optimum, 0 where that does not help."""
    ideal = scale + torch.where(curvature > 0, slope / curvature, torch.zeros_like(slope))
    rounded = ideal.clamp(0.0, FP16_MAX).to(torch.float16).float()
    step = rounded - scale
    helps = step * (2 * slope - curvature * step) > 0
    legal = helps & (scale > 0) & (rounded > 0) & (curvature > 0)
    return torch.where(legal, step, torch.zeros_like(step))
