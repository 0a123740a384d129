"""The inner loop of GPTQ: quantize the columns of one group, each correcting those after it.

    q_j = clamp(round(w_j / scale + zero), 0, max_code)
    e_j = w_j - scale * (q_j - zero)
    w_i -= e_j * u[j, i]  for i > j

(arXiv 2210.17323, algorithm 1, with the rows of the Cholesky factor divided by their diagonal,
so that the error needs no division.) One block is one group: scale and zero are vectors over
rows. The correction of columns outside the block is one matrix product left to the caller.

The torch version looks left instead of right, w_j = w_j - sum_i<j e_i * u[i, j], on transposed
tensors: one matrix-vector product per column over contiguous rows, nothing allocated in the
loop. Rounding is half to even after a multiplication by 1/scale in every version. fp32 sums are
ordered differently in each version, so codes may differ where a value lies on a tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill_kernels.backend import resolve_backend


def gptq_block(
    w: Tensor,
    u: Tensor,
    scale: Tensor,
    zero: Tensor,
    max_code: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Quantize one block of columns.

    w: f32 [R, C] weights, not modified. u: f32 [C, C] upper triangular with H^-1 = U^T U, each
    row divided by its diagonal. scale, zero: f32 [R]; scale 0 gives code 0 and value 0.
    Returns codes u8 [R, C] and error f32 [R, C] = w as corrected - its quantized value.
    """
    if w.dtype != torch.float32 or u.shape != (w.shape[1], w.shape[1]):
        raise ValueError(
            f"w is {w.dtype} {tuple(w.shape)} and u is {tuple(u.shape)}: "
            "give w as float32 [R, C] and u as [C, C]"
        )
    live = scale > 0
    inverse = torch.where(live, 1.0 / scale, 0.0)
    zero = torch.where(live, zero, 0.0)
    if resolve_backend(backend, w.device) == "triton":
        from bitmill_kernels.gptq.block_triton import gptq_block_triton

        return gptq_block_triton(w, u, scale, inverse, zero, max_code)
    return _gptq_block_torch(w, u, scale, inverse, zero, max_code)


def _gptq_block_torch(
    w: Tensor, u: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor, max_code: int
) -> tuple[Tensor, Tensor]:
    R, C = w.shape
    columns = w.t().contiguous()
    coefficients = u.t().contiguous()
    codes = torch.empty(C, R, dtype=torch.uint8, device=w.device)
    error = torch.empty_like(columns)
    code = torch.empty_like(scale)
    for j in range(C):
        column = columns[j]
        if j:
            column.addmv_(error[:j].t(), coefficients[j, :j], alpha=-1.0)
        torch.addcmul(zero, column, inverse, out=code).clamp_(0.0, float(max_code)).round_()
        codes[j] = code
        torch.addcmul(column, code.sub_(zero), scale, value=-1.0, out=error[j])
    return codes.t().contiguous(), error.t().contiguous()
