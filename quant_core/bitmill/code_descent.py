"""Coordinate descent on the codes with all grids frozen, after GPTQ.

    q_j = clamp(round((ŵ_j + (R H)_j / H_jj) / s + z)),   R = W - ŵ

is the exact minimum of tr(R H R^T) along one column (arXiv 2309.01885, QuantEase, equation 8).
GPTQ fixes every column once, knowing only what comes after it; sweeping again lets early columns
answer to late ones. Columns of a group run in turn on a [N, 128] slice of R H, and one product per
group carries its changes to all other columns. The error never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.codes import LinearCodes
from bitmill.grid import max_code


def descend_codes(W: Tensor, codes: LinearCodes, H: Tensor, *, sweeps: int = 1) -> LinearCodes:
    """New codes on frozen grids: W f32 [N, K] is the target, H f32 [K, K], both in packed order.

    Never increases tr((W - ŵ) H (W - ŵ)^T). Columns with H_jj = 0 keep their codes.
    """
    result = codes.codes.clone()
    gradient = (W - codes.values()) @ H
    for _ in range(sweeps):
        for group, part in codes.groups():
            new, change = _descend_group(
                result[:, part],
                gradient[:, part],
                H[part, part],
                codes.scales[group],
                codes.zeros[group],
                max_code(codes.widths[group]),
            )
            result[:, part] = new
            gradient -= change @ H[part]
    return LinearCodes(result, codes.scales, codes.zeros, codes.widths)


def _descend_group(
    codes: Tensor, gradient: Tensor, H: Tensor, scale: Tensor, zero: Tensor, top: int
) -> tuple[Tensor, Tensor]:
    """New codes [N, C] of one group and the change of its values [N, C].

    In codes: with y = (R H)_j / (s H_jj), the new code is round(q_j + y); what column j changes,
    every later column k of the group feels as H_jk times the change.
    """
    code = codes.T.float().contiguous()
    slope = gradient.T.contiguous()
    diagonal = H.diagonal()
    live = diagonal > 0
    inverse = torch.where(live, 1.0 / diagonal, torch.zeros_like(diagonal)).tolist()
    per_scale = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    change = torch.zeros_like(slope)
    for j in range(len(slope)):
        if j:
            slope[j].addmv_(change[:j].T, H[j, :j], alpha=-1.0)
        new = torch.addcmul(code[j], slope[j], per_scale, value=inverse[j])
        new.round_().clamp_(0, top)
        torch.mul(new - code[j], scale, out=change[j])
        code[j] = new
    return code.T.to(torch.uint8), change.T.contiguous()
