"""One sweep of coordinate descent over the codes of one group, on a frozen grid.

    q_j <- clamp(round(q_j + g_j / (scale * H_jj)), 0, max_code)
    c_j  = scale * (new q_j - old q_j)
    g_i -= c_j * H[j, i]  for i > j

g = (W - ŵ) H restricted to the group: what the quadratic tr((W - ŵ) H (W - ŵ)^T) falls by along
each column. Every step is the exact minimum along its column (arXiv 2309.01885, QuantEase).
Columns with H_jj <= 0 and rows with scale 0 keep their codes. The caller carries the changes to the
columns outside the group by one matrix product.

Like `block.py`, the torch version looks left on transposed tensors and Triton keeps a tile of
rows in registers; ties may round differently where their sums differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill_kernels.backend import resolve_backend


def descend_block(
    codes: Tensor,
    slope: Tensor,
    H: Tensor,
    scale: Tensor,
    max_code: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """New codes u8 [R, C] and the change of their values f32 [R, C].

    codes: u8 [R, C]; slope: g f32 [R, C]; H: f32 [C, C] symmetric; scale: f32 [R] >= 0. None of
    them is modified.
    """
    if codes.shape != slope.shape or H.shape != (codes.shape[1], codes.shape[1]):
        raise ValueError(
            f"codes are {tuple(codes.shape)}, slope {tuple(slope.shape)}, H {tuple(H.shape)}: "
            "give codes and slope as [R, C] and H as [C, C]"
        )
    diagonal = H.diagonal()
    curvature = torch.where(diagonal > 0, 1.0 / diagonal, 0.0)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    if resolve_backend(backend, codes.device) == "triton":
        from bitmill_kernels.gptq.code_descent_triton import descend_block_triton

        return descend_block_triton(codes, slope, H, curvature, scale, inverse, max_code)
    return _descend_block_torch(codes, slope, H, curvature, scale, inverse, max_code)


def _descend_block_torch(
    codes: Tensor,
    slope: Tensor,
    H: Tensor,
    curvature: Tensor,
    scale: Tensor,
    inverse: Tensor,
    max_code: int,
) -> tuple[Tensor, Tensor]:
    code = codes.t().float().contiguous()
    g = slope.t().contiguous()
    if g.data_ptr() == slope.data_ptr():
        g = g.clone()
    change = torch.zeros_like(g)
    steps = curvature.tolist()
    for j in range(len(g)):
        if j:
            g[j].addmv_(change[:j].t(), H[j, :j], alpha=-1.0)
        new = torch.addcmul(code[j], g[j], inverse, value=steps[j])
        new.clamp_(0.0, float(max_code)).round_()
        torch.mul(new - code[j], scale, out=change[j])
        code[j] = new
    return code.t().to(torch.uint8).contiguous(), change.t().contiguous()
