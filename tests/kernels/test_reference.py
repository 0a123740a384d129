import torch

from bitmill_kernels.reference import dequantize, mixed_matmul


def test_dequantize_is_scale_times_code_minus_zero_per_group():
    codes = torch.tensor([[3] * 128 + [1] * 5, [0] * 128 + [0] * 5], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 0.25], [2.0, 4.0]], dtype=torch.float16)
    zeros = torch.tensor([[1, 2], [4, 12]], dtype=torch.uint8)
    weight = dequantize(codes, scales, zeros, (2, 1))
    assert weight.dtype == torch.float32
    assert weight[0, 0] == 1.0
    assert weight[1, 127] == -0.5
    assert weight[0, 128] == 2.0 * (1 - 4 / 8)
    assert weight[1, 132] == 4.0 * (0 - 12 / 8)


def test_matmul_gathers_the_inputs_in_packed_order_and_adds_the_bias():
    codes = torch.tensor([[1, 0, 2]], dtype=torch.uint8)
    one, none = torch.ones(1, 1, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.uint8)
    x = torch.tensor([[10.0, 20.0, 30.0]])
    order = torch.tensor([2, 0, 1], dtype=torch.int32)
    y = mixed_matmul(x, codes, one, none, (2,), order=order, bias=torch.tensor([0.5]))
    assert y.tolist() == [[30.0 + 2 * 20.0 + 0.5]]
