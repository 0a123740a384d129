"""Accumulation of the GPTQ Hessian H += x^T diag(weight) x, fp32 sums, never TF32.

bf16 and fp16 inputs on CUDA multiply in the tensor cores with fp32 output: their products are
exact in fp32. A per-token weight is applied in fp32 and takes the slower fp32 product. The
factor 2/T of the paper (arXiv 2210.17323, section 3) is left to the caller: scale once at the
end, not once per batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FP32_CHUNK_TOKENS = 8192


def hessian_update(H: Tensor, x: Tensor, weight: Tensor | None = None) -> None:
    """Add the inputs x [T, K] (bf16, fp16 or f32), weighted f32 [T], to H f32 [K, K] in place."""
    if H.dtype != torch.float32 or H.shape != (x.shape[1], x.shape[1]):
        raise ValueError(
            f"H is {H.dtype} {tuple(H.shape)} for inputs {tuple(x.shape)}: "
            f"give float32 [{x.shape[1]}, {x.shape[1]}]"
        )
    if weight is None and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        H += torch.mm(x.t(), x, out_dtype=torch.float32)
        return
    with _exact_fp32():
        for start in range(0, x.shape[0], FP32_CHUNK_TOKENS):
            rows = x[start : start + FP32_CHUNK_TOKENS].float()
            left = rows
            if weight is not None:
                left = rows * weight[start : start + FP32_CHUNK_TOKENS, None].float()
            H.addmm_(left.t(), rows)


@contextmanager
def _exact_fp32() -> Iterator[None]:
    """Hold torch's fp32 matmul precision at full fp32, whatever the process has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
