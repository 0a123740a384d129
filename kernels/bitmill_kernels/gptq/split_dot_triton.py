"""fp32 products of tiles in Triton from TF32 ones; `linalg/split_product.py` makes them from bf16.

A value's high part keeps the 11 leading bits, which TF32 holds exactly; of what is left the tensor
cores take as many. Triton's own "tf32x3" does the same with checks for infinities around it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _high(x: tl.tensor) -> tl.tensor:
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def split_dot(left: tl.tensor, right: tl.tensor, total: tl.tensor) -> tl.tensor:
    """total + left right of f32 [M, K], [K, N] and [M, N]."""
    left_high, right_high = _high(left), _high(right)
    total = tl.dot(left - left_high, right_high, total, input_precision="tf32")
    total = tl.dot(left_high, right - right_high, total, input_precision="tf32")
    return tl.dot(left_high, right_high, total, input_precision="tf32")
