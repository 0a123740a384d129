"""The activation prologue: inputs cast, scaled, and put in the order the decode kernel reads.

For each token t, with a power of two e_t such that |x / e_t| < 2^15:

    rows[t, slot * 128 + c] = fp16(x[t, column(slot, c)] / e_t * 2^-(w * field(c)))
    sums[slot, t]           = 2^-24 * sum_c of the same values with their 2^(w * field) put back
    factor[t]               = e_t * 2^24

where column(slot, c) is order[first + c], 0 past the live columns, and w the width of the slot's
low plane. The decode kernel feeds fields to the tensor cores where they stand in the byte, as
fp16 subnormals code * 2^(w * field - 24); the factors of two cancel exactly. A scale per token
makes fp16 hold bf16 inputs of any size. `sums` adds what the tensor cores see, so a zero point
cancels a code exactly.

One launch serves all linears that read the same input. Every program finds its token's maximum
anew: the row is in the L2 cache, and a second launch would cost more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitmill_kernels.layout import GROUP_SIZE
from bitmill_kernels.matmul.runtime import RuntimeWeight

SLOTS_PER_PROGRAM = 4
MAXIMUM_BLOCK = 4096
SMALLEST_EXPONENT = 16


@triton.jit(do_not_specialize=["slot_count"])
def _prologue_kernel(
    x_ptr: tl.tensor,
    order_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    K: tl.tensor,
    slot_count: tl.tensor,
    x_stride: tl.tensor,
    sums_stride: tl.tensor,
    HAS_ORDER: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    x_row = x_ptr + token.to(tl.int64) * x_stride
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(x_row + k, mask=k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    bits = tl.max(largest, axis=0).to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits >> 23, 16) - 14
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    if tl.program_id(1) == 0:
        tl.store(factor_ptr + token, (exponent << 23).to(tl.float32, bitcast=True) * 16777216.0)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    live_slot = slot < slot_count
    first = tl.load(slots_ptr + slot * 4, mask=live_slot, other=0)
    live = tl.load(slots_ptr + slot * 4 + 1, mask=live_slot, other=0)
    plane = tl.load(slots_ptr + slot * 4 + 2, mask=live_slot, other=1)
    c = tl.arange(0, 128)
    mask = c[None, :] < live[:, None]
    column = first[:, None] + c[None, :]
    if HAS_ORDER:
        column = tl.load(order_ptr + column, mask=mask, other=0)
    value = tl.load(x_row + column, mask=mask, other=0.0).to(tl.float32) * inverse
    shift = (c[None, :] // (16 * plane)[:, None]) * plane[:, None]
    down = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    up = ((127 + shift) << 23).to(tl.float32, bitcast=True)
    scaled = (value * down).to(tl.float16)
    out = rows_ptr + token.to(tl.int64) * slot_count * 128
    tl.store(out + slot[:, None] * 128 + c[None, :], scaled, mask=live_slot[:, None] & (c >= 0))
    total = tl.sum(scaled.to(tl.float32) * up, axis=1) * 5.9604644775390625e-08
    tl.store(sums_ptr + slot * sums_stride + token, total, mask=live_slot)


def prologue_triton(
    x: Tensor, weight: RuntimeWeight, rows: Tensor, sums: Tensor, factor: Tensor
) -> None:
    """Fill rows f16 [T, 256 * pairs], sums f32 [2 * pairs, >= T], factor f32 [T] from x [T, K]."""
    slot_count = weight.slots.shape[0]
    grid = (x.shape[0], triton.cdiv(slot_count, SLOTS_PER_PROGRAM))
    _prologue_kernel[grid](
        x,
        weight.slots if weight.order is None else weight.order,
        weight.slots,
        rows,
        sums,
        factor,
        weight.K,
        slot_count,
        x.stride(0),
        sums.stride(0),
        HAS_ORDER=weight.order is not None,
        SLOTS=SLOTS_PER_PROGRAM,
        BLOCK=min(MAXIMUM_BLOCK, triton.next_power_of_2(weight.K)),
        num_warps=4,
    )


def prologue_reference(x: Tensor, weight: RuntimeWeight) -> tuple[Tensor, Tensor, Tensor]:
    """(rows f16 [T, 256 * pairs], sums f32 [2 * pairs, T], factor f32 [T]): the obvious version."""
    values = x.float() if weight.order is None else x.float()[:, weight.order.long()]
    exponent = (values.abs().amax(1).view(torch.int32) >> 23).clamp(min=SMALLEST_EXPONENT) - 14
    inverse = ((254 - exponent) << 23).view(torch.float32)
    rows = torch.zeros(x.shape[0], weight.slots.shape[0], GROUP_SIZE, device=x.device)
    field_scale = torch.empty(weight.slots.shape[0], GROUP_SIZE, device=x.device)
    for slot, (first, live, plane, _) in enumerate(weight.slots.tolist()):
        rows[:, slot, :live] = values[:, first : first + live] * inverse[:, None]
        field = torch.arange(GROUP_SIZE, device=x.device) // (16 * plane)
        field_scale[slot] = torch.exp2(-plane * field.float())
    scaled = (rows * field_scale).half()
    sums = (scaled.float() / field_scale).sum(-1).t().contiguous() * 2.0**-24
    factor = (exponent << 23).view(torch.float32) * 2.0**24
    return scaled.flatten(1), sums, factor
