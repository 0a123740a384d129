"""The grid of ExLlamaV2's format: one number per group, 16 squared steps of it per row.

    w = s (q - 2^(b-1)),   s = k^2 m,   k in 1..16,   m of the group

with m, k^2 and their product in fp16, as its kernel computes them (exllamav2 0.3.2, `qdq_util.cuh`;
its files hold 256 m). Zero points are always in the middle. Torch alone; nothing of the format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.quant.grid import Grid, max_code

STEPS = 16
SHARES = tuple(1.2 - 0.05 * i for i in range(15))
"""Of the largest scale that a range asks for: the numbers that are tried, 1.2 down to 0.5."""
_MOST = 65504.0 / STEPS**2


def fit(W: Tensor, width: int, weight: Tensor) -> Grid:
    """The grid of least weighted squared error for W f32 [N, c], its zero points in the middle.

    weight: f32 [c]. Every number in `SHARES` is tried, with the best k of every row.
    """
    zero, top = float(1 << (width - 1)), max_code(width)
    widest = W.abs().amax() / zero
    best, least = torch.zeros(len(W), device=W.device), torch.inf
    for share in SHARES:
        scales = row_scales(share * widest / STEPS**2, W.device)
        errors = torch.stack([_error(W, scale, zero, top, weight) for scale in scales])
        lowest, chosen = errors.min(0)
        total = float(lowest.sum(dtype=torch.float64))
        if total < least:
            best, least = scales[chosen], total
    return Grid(best, torch.full_like(best, zero))


def row_scales(number: float | Tensor, device: torch.device) -> Tensor:
    """f32 [16]: the scales that a group with m = `number` can have."""
    m = torch.as_tensor(number, dtype=torch.float32, device=device).clamp(max=_MOST).half()
    k = torch.arange(1, STEPS + 1, device=device)
    return ((k * k).half() * m).float()


def _error(W: Tensor, scale: Tensor, zero: float, top: int, weight: Tensor) -> Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    codes = (W * inverse + zero).round_().clamp_(0, top)
    return (W - scale * (codes - zero)).square_() @ weight


def find_steps(scales: Tensor) -> tuple[Tensor, Tensor] | None:
    """m f16 [] and k u8 [N] in 1..16 that give scales f16 [N] exactly; None where none do."""
    largest = scales.max()
    if largest == 0:
        return largest, torch.ones(len(scales), dtype=torch.uint8)
    for k in range(STEPS, 0, -1):
        near = (largest.float() / (k * k)).half()
        for m in _neighbours(near):
            known = row_scales(m, scales.device).half()
            same = scales[:, None] == known
            if bool(same.any(1).all()):
                return m, (same.to(torch.uint8).argmax(1) + 1).to(torch.uint8)
    return None


def _neighbours(value: Tensor) -> list[Tensor]:
    """A positive f16 and those on either side of it."""
    bits = value.view(torch.int16)
    return [(bits + step).view(torch.float16) for step in (0, -1, 1) if bits + step > 0]
