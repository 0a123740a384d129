"""The obvious version of every fast operation: what the kernels are compared with.

    weight:  w[n, k] = scale[g, n] * (code[n, k] - zero[g, n]),  g the group of column k
    matmul:  y[t, n] = sum_k x[t, order[k]] * w[n, k] + bias[n]
    GPTQ:    q_j = clamp(round(w_j / scale + zero)), e_j = w_j - scale * (q_j - zero),
             w_i -= e_j * u[j, i] for i > j  (arXiv 2210.17323, algorithm 1; rows of u already
             divided by their diagonal)
    descent: q_j = clamp(round(q_j + g_j / (scale * H_jj))), g_i -= change_j * H[j, i] for i > j
    Hessian: H += sum_t weight[t] * x[t]^T x[t]

Nothing here is fast: whole matrices, one column at a time. The zero point of width 1 is stored
in eighths (`layout.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitmill_kernels.layout import ZERO_STEPS_OF_WIDTH_1, check_widths, group_columns


def real_zeros(zeros: Tensor, widths: Sequence[int]) -> Tensor:
    """Zero points f32 [G, N] in code units from the stored ones u8 [G, N]."""
    steps = [ZERO_STEPS_OF_WIDTH_1 if width == 1 else 1 for width in widths]
    return zeros.float() / torch.tensor(steps, device=zeros.device, dtype=torch.float32)[:, None]


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, widths: Sequence[int]) -> Tensor:
    """Weights f32 [N, K] from codes u8 [N, K], scales f16 [G, N], stored zeros u8 [G, N].

    Columns stay in packed order. Computed in fp32: the product is rounded once.
    """
    check_widths(widths, codes.shape[1])
    columns = torch.tensor(group_columns(codes.shape[1]), device=codes.device)
    zero = real_zeros(zeros, widths).t().repeat_interleave(columns, dim=1)
    scale = scales.float().t().repeat_interleave(columns, dim=1)
    return scale * (codes.float() - zero)


def mixed_matmul(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    widths: Sequence[int],
    *,
    order: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """y [T, N] in `dtype` from x [T, K]; `order` i32 [K] maps packed columns to input columns."""
    weight = dequantize(codes, scales, zeros, widths).to(dtype)
    inputs = x.to(dtype) if order is None else x.to(dtype)[:, order.long()]
    y = inputs @ weight.t()
    return y if bias is None else y + bias.to(dtype)


def gptq_block(
    w: Tensor, u: Tensor, scale: Tensor, zero: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Right-looking column loop; arguments and results as in `gptq.gptq_block`."""
    w = w.clone()
    codes = torch.zeros(w.shape, dtype=torch.uint8, device=w.device)
    error = torch.zeros_like(w)
    live = scale > 0
    inverse = torch.where(live, 1.0 / scale, 0.0)
    zero = torch.where(live, zero, 0.0)
    for j in range(w.shape[1]):
        code = (w[:, j] * inverse + zero).clamp(0, max_code).round()
        codes[:, j] = code.to(torch.uint8)
        error[:, j] = w[:, j] - scale * (code - zero)
        w[:, j + 1 :] -= error[:, j, None] * u[j, j + 1 :]
    return codes, error


def descend_block(
    codes: Tensor, slope: Tensor, H: Tensor, scale: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    """Right-looking sweep; arguments and results as in `code_descent.descend_block`."""
    codes, g = codes.clone(), slope.clone()
    change = torch.zeros_like(g)
    for j in range(codes.shape[1]):
        live = (scale > 0) & (H[j, j] > 0)
        step = torch.where(live, g[:, j] / (scale * H[j, j]), 0.0)
        new = (codes[:, j] + step).clamp(0, max_code).round()
        change[:, j] = (new - codes[:, j]) * scale
        codes[:, j] = new.to(torch.uint8)
        g[:, j + 1 :] -= change[:, j, None] * H[j, j + 1 :]
    return codes, change


def hessian_update(H: Tensor, x: Tensor, weight: Tensor | None = None) -> None:
    """H [K, K] += x^T diag(weight) x in the precision of H, x [T, K]."""
    rows = x.to(H.dtype)
    H += (rows if weight is None else rows * weight.to(H.dtype)[:, None]).t() @ rows
