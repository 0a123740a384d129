import pytest
import torch

from bitmill_kernels.layout import WIDTHS
from bitmill_kernels.matmul.runtime import PackedWeight, build_runtime, dequantize_runtime
from bitmill_kernels.reference import dequantize
from kernel_cases import random_linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("N", "K"), [(5, 128), (128, 256), (130, 300), (7, 64)])
def test_every_width_reads_back(width, N, K):
    widths = [width] * -(-K // 128)
    weight, codes, scales, zeros = random_linear(N, K, widths, seed=width)
    runtime = build_runtime([weight], CPU)
    assert torch.equal(dequantize_runtime(runtime), dequantize(codes, scales, zeros, widths))


def test_siblings_of_different_widths_stack_by_rows():
    q, *q_parts = random_linear(20, 700, (3, 2, 8, 3, 1, 4), seed=1)
    k, *k_parts = random_linear(130, 700, (5, 5, 5, 6, 2, 2), seed=2)
    runtime = build_runtime([q, k], CPU)
    expected = torch.cat([dequantize(*q_parts, q.widths), dequantize(*k_parts, k.widths)])
    assert torch.equal(dequantize_runtime(runtime), expected)
    assert runtime.N == 150
    assert [member.first_output for member in runtime.members] == [0, 20]
    assert runtime.width_mask == 0b1111111


def test_dropped_groups_take_no_bytes():
    weight, *parts = random_linear(130, 700, (0, 2, 0, 3, 2, 0), seed=1)
    kept, *_ = random_linear(130, 384, (2, 3, 2), seed=1)
    runtime = build_runtime([weight], CPU)
    assert runtime.dropped
    assert torch.equal(dequantize_runtime(runtime), dequantize(*parts, weight.widths))
    assert runtime.nbytes == build_runtime([kept], CPU).nbytes
    assert not build_runtime([kept], CPU).dropped


def test_a_linear_that_is_dropped_whole_keeps_its_outputs():
    nothing, *_ = random_linear(20, 300, (0, 0, 0))
    other, *parts = random_linear(7, 300, (3, 0, 2), seed=2)
    runtime = build_runtime([nothing, other], CPU)
    expected = torch.cat([torch.zeros(20, 300), dequantize(*parts, other.widths)])
    assert torch.equal(dequantize_runtime(runtime), expected)
    assert [pair.groups for pair in runtime.members[0].pairs] == [(None, None)]
    assert runtime.slots.tolist()[:2] == [[0, 0, 1, 1]] * 2


def test_slots_name_the_source_columns_of_each_group_in_pair_order():
    weight, *_ = random_linear(4, 300, (4, 2, 4))
    runtime = build_runtime([weight], CPU)
    assert runtime.slots.tolist() == [
        [128, 128, 2, 2],
        [0, 0, 2, 2],
        [0, 128, 4, 4],
        [256, 44, 4, 4],
    ]


def test_every_offset_is_a_multiple_of_16_bytes():
    weight, *_ = random_linear(3, 900, (1, 2, 3, 4, 5, 6, 8, 1))
    runtime = build_runtime([weight], CPU)
    offsets = [x for pair in runtime.members[0].pairs for x in (pair.low, pair.high, pair.grid)]
    assert all(offset % 16 == 0 for offset in offsets)


def test_linears_of_different_inputs_are_not_stacked():
    a, *_ = random_linear(4, 256, (2, 2), ordered=True)
    b, *_ = random_linear(4, 256, (2, 2))
    with pytest.raises(ValueError, match="same columns in the same order"):
        build_runtime([a, b], CPU)
    shared = PackedWeight(b.tensors, b.widths, 4, 256, a.order.clone())
    assert build_runtime([a, shared], CPU).N == 8
