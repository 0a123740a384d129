"""Coordinate descent on the codes with all grids frozen, after GPTQ.

    q_j = clamp(round((ŵ_j + (R H)_j / H_jj) / s + z)),   R = W - ŵ

is the exact minimum of tr(R H R^T) along one column (arXiv 2309.01885, QuantEase, equation 8).
GPTQ fixes every column once, knowing only what comes after it; sweeping again lets early columns
answer to late ones. Columns of a group run in turn on a [N, 128] slice of R H, and one product per
group carries its changes to all other columns. The error never rises.
"""

from __future__ import annotations

from torch import Tensor

from bitmill.quant.codes import LinearCodes
from bitmill.quant.grid import max_code
from bitmill_kernels.gptq.code_descent import descend_block


def descend_codes(W: Tensor, codes: LinearCodes, H: Tensor, *, sweeps: int = 1) -> LinearCodes:
    """New codes on frozen grids: W f32 [N, K] is the target, H f32 [K, K], both in packed order.

    Never increases tr((W - ŵ) H (W - ŵ)^T). Columns with H_jj = 0 keep their codes.
    """
    result = codes.codes.clone()
    gradient = (W - codes.values()) @ H
    for _ in range(sweeps):
        for group, part in codes.groups():
            new, change = descend_block(
                result[:, part],
                gradient[:, part],
                H[part, part],
                codes.scales[group],
                max_code(codes.widths[group]),
            )
            result[:, part] = new
            gradient -= change @ H[part]
    return LinearCodes(result, codes.scales, codes.zeros, codes.widths)
