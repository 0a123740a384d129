"""Grids that vectors are rounded to.

min-max      s = (max x - min x) / (2^b - 1)        x' = min x + s round((x - min x) / s)
symmetric    s = max |x| / (2^(b-1) - 1)            x' = s round(x / s)
E4M3         s = max |x| / 448                      x' = s e4m3(x / s)
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST = 1e-30
LARGEST_E4M3 = 448.0


def rounded_tokens(x: Tensor, bits: int) -> Tensor:
    """x [..., C], each vector on its own min-max grid of 2^bits values; in the dtype of x."""
    least, most = x.float().aminmax(dim=-1, keepdim=True)
    return rounded_between(x, least, most, bits)


def rounded_between(x: Tensor, least: Tensor, most: Tensor, bits: int) -> Tensor:
    """x on 2^bits values from least to most, which broadcast with it; what lies outside goes to the
    nearest end."""
    step = ((most - least) / (2**bits - 1)).clamp(min=_SMALLEST)
    steps = ((x.float() - least) / step).round().clamp(0, 2**bits - 1)
    rounded: Tensor = (least + steps * step).to(x.dtype)
    return rounded


def symmetric_tokens(x: Tensor, bits: int) -> Tensor:
    """x [..., C], each vector on 2^bits - 1 values around 0 of its own."""
    step = x.float().abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    step = step.clamp(min=_SMALLEST)
    rounded: Tensor = ((x.float() / step).round() * step).to(x.dtype)
    return rounded


def fp8_tokens(x: Tensor) -> Tensor:
    """x [..., C] in E4M3, each vector with its own scale."""
    scale = (x.float().abs().amax(-1, keepdim=True) / LARGEST_E4M3).clamp(min=_SMALLEST)
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)
