"""Undoing the shrinkage of quantized rows.

    s <- s * (w H w^T / ŵ H w^T)^a        per row of W, all groups alike; a = 1 in full

A grid fitted by least squares has errors uncorrelated with ŵ, not with w: on average each output
comes out too small, by about its relative error. One linear hardly suffers, but the shrinkage has
the same sign in every linear of every block and adds up where errors of random sign average out.
Scaling a row so that its outputs regress on the source's with slope 1 costs a little squared error
of that row (the factor's own noise) and removes the common part. New scales are rounded to fp16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.quant.codes import LinearCodes
from bitmill.quant.grid import FP16_MAX

LARGEST_GAIN = 1.5
"""Rows that kept less than 2/3 of their output are mostly noise, which a gain would amplify."""


def restore_gain(W: Tensor, codes: LinearCodes, H: Tensor, *, strength: float = 1.0) -> LinearCodes:
    """Codes with rescaled rows: W f32 [N, K] is the target, H f32 [K, K], both in packed order."""
    weighted = W @ H
    own = (weighted * W).sum(1)
    shared = (weighted * codes.values()).sum(1)
    gain = torch.where((own > 0) & (shared > 0), own / shared, torch.ones_like(own))
    gain = gain.clamp(1 / LARGEST_GAIN, LARGEST_GAIN) ** strength
    scales = (codes.scales * gain).clamp(max=FP16_MAX).to(torch.float16).float()
    scales = torch.where((codes.scales > 0) & (scales == 0), codes.scales, scales)
    return LinearCodes(codes.codes, scales, codes.zeros, codes.widths)
