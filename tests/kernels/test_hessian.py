import pytest
import torch

from bitmill_kernels import reference
from bitmill_kernels.linalg.hessian import (
    FP32_CHUNK_TOKENS,
    WHOLE_COLUMNS,
    column_blocks,
    hessian_update,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("T", [1, 50, FP32_CHUNK_TOKENS + 3])
def test_sums_match_double_precision(dtype, weighted, T):
    generator = torch.Generator().manual_seed(T)
    x = (torch.randn(T, 24, generator=generator) + 1.0).to(dtype)
    weight = torch.rand(T, generator=generator) if weighted else None
    H = torch.ones(24, 24)
    exact = torch.ones(24, 24, dtype=torch.float64)
    hessian_update(H, x, weight)
    reference.hessian_update(exact, x, weight)
    assert ((H.double() - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("K", [WHOLE_COLUMNS + 1, 2200])
def test_the_upper_triangle_of_a_large_hessian_is_whole(K):
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(K))
    H = torch.ones(K, K)
    hessian_update(H, x)
    exact = torch.ones(K, K) + x.T @ x
    assert torch.allclose(H.triu(), exact.triu(), atol=1e-5)
    assert torch.equal(H.tril(-640), torch.ones(K, K).tril(-640))


def test_column_blocks_are_whole_groups_and_leave_nothing_out():
    assert [(c.start, c.stop) for c in column_blocks(2200)] == [
        (0, 640),
        (640, 1280),
        (1280, 1920),
        (1920, 2200),
    ]


def test_the_process_wide_precision_is_kept_but_not_used():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        hessian_update(torch.zeros(4, 4), torch.ones(3, 4))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_hessian_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"give float32 \[4, 4\]"):
        hessian_update(torch.zeros(3, 3), torch.ones(2, 4))
