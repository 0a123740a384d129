"""Random packed linears for the kernel tests."""

import torch

from bitmill_kernels.layout import code_tensor_shapes, group_columns, zero_tensor_shapes
from bitmill_kernels.matmul.runtime import PackedWeight
from bitmill_kernels.pack import pack_codes, pack_zeros


def random_linear(N, K, widths, *, seed=0, ordered=False):
    """(PackedWeight, its codes u8 [N, K], scales f16 [G, N], stored zeros u8 [G, N])."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.cat(
        [
            torch.randint(0, 1 << width, (N, columns), generator=generator, dtype=torch.uint8)
            for width, columns in zip(widths, group_columns(K), strict=True)
        ],
        dim=1,
    )
    scales = (torch.rand(len(widths), N, generator=generator) * 0.01 + 0.001).half()
    scales *= torch.tensor(widths)[:, None] > 0
    zeros = torch.stack(
        [
            torch.randint(0, 16 if w == 1 else 1 << w, (N,), generator=generator, dtype=torch.uint8)
            for w in widths
        ]
    )
    order = torch.randperm(K, generator=generator).to(torch.int32) if ordered else None
    tensors = pack_codes(codes, widths) | pack_zeros(zeros, widths) | {"scales": scales}
    return PackedWeight(tensors, tuple(widths), N, K, order), codes, scales, zeros


def random_planes(N, K, widths, device, *, ordered=False):
    """A PackedWeight made on a device from random bytes: every byte is a legal code."""
    shapes = code_tensor_shapes(N, K, widths) | zero_tensor_shapes(N, widths)
    tensors = {
        name: torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        for name, shape in shapes.items()
    }
    tensors["scales"] = (torch.rand(len(widths), N, device=device) * 0.01 + 0.001).half()
    order = torch.randperm(K, device=device).to(torch.int32) if ordered else None
    return PackedWeight(tensors, tuple(widths), N, K, order)
