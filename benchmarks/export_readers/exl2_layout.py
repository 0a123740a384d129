"""The values of an exl2 linear, by the layout of ExLlamaV2 and in torch alone, on any device.

    w = k^2 m (code - 2^(b-1)),   m = q_scale_max / 256,   k = 1 + a nibble of q_scale

Codes are a stream of bits down the columns of `q_weight`, group after group; m and k^2 m are fp16,
as in its kernels, the product with the code is not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weight(words: Tensor, groups: Tensor, steps: Tensor, largest: Tensor) -> Tensor:
    """f32 [N, K], columns in the order of their groups.

    words i32 [W, N], groups i16 [2 G], steps i32 [G, N / 8], largest f16 [G]: q_weight, q_groups,
    q_scale and q_scale_max.
    """
    starts, parts = [*groups[1::2].tolist(), len(words)], []
    k = _fields(steps.T, 4) + 1
    for group, bits in enumerate(groups[0::2].tolist()):
        scale = (k[group] ** 2).half() * (largest[group] / 256)
        codes = _fields(words[starts[group] : starts[group + 1]], bits)
        parts.append(scale.float()[:, None] * (codes - (1 << (bits - 1))).float())
    return torch.cat(parts, 1)


def _fields(stream: Tensor, bits: int) -> Tensor:
    """Numbers of so many bits that follow each other down the columns of i32 [W, C]: i64 [C, n]."""
    places = torch.arange(8, dtype=torch.uint8, device=stream.device)
    ones = stream.T.contiguous().view(torch.uint8)[..., None] >> places & 1
    return (ones.view(stream.shape[1], -1, bits).int() << places[:bits]).sum(-1)
