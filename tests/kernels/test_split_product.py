import pytest
import torch

from bitmill_kernels.linalg.split_product import (
    LOW_LEFT,
    LOW_RIGHT,
    grouped_parts,
    left_parts,
    parts_product,
    right_parts,
    split_product,
)


def factors(M, K, N, flip_left=False, flip_right=False):
    generator = torch.Generator().manual_seed(M + K + N)
    left = torch.randn(M, K, generator=generator)
    right = torch.randn(K, N, generator=generator) * 1e20
    left = left.T.contiguous().T if flip_left else left
    right = right.T.contiguous().T if flip_right else right
    return left, right


def missed(found, left, right):
    """Root mean square error over that of the exact product."""
    exact = left.double() @ right.double()
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("flip_left", [False, True])
@pytest.mark.parametrize("flip_right", [False, True])
@pytest.mark.parametrize(("M", "K", "N"), [(5, 300, 7), (64, 1, 1), (1, 129, 40)])
def test_three_products_of_halves_are_nearly_one_of_floats(M, K, N, flip_left, flip_right):
    left, right = factors(M, K, N, flip_left, flip_right)
    parts = left_parts(left), right_parts(right)
    assert [p.dtype for p in parts] == [torch.bfloat16] * 2
    assert parts[0].shape == (M, 3 * K)
    assert parts[1].shape == (3 * K, N)
    assert missed(parts_product(*parts), left, right) < 2e-5
    assert missed(left.bfloat16().double() @ right.bfloat16().double(), left, right) > 1e-4


def test_parts_of_strided_factors_keep_their_layout():
    left, right = factors(48, 96, 32)
    assert left_parts(left).stride() == (3 * 96, 1)
    assert left_parts(left.T.contiguous().T).stride() == (1, 48)
    assert right_parts(right[:, 8:24]).stride() == (16, 1)
    expected = right_parts(right)[:, 8:24]
    assert torch.equal(right_parts(right[:, 8:24]), expected)


def test_on_the_cpu_it_is_the_plain_product():
    left, right = factors(5, 300, 7)
    assert torch.equal(split_product(left, right), left @ right)


@pytest.mark.parametrize("K", [1, 128, 300])
def test_any_run_of_groups_can_be_multiplied(K):
    left, right = factors(40, K, 7)
    parts = grouped_parts(left.T, LOW_LEFT), grouped_parts(right, LOW_RIGHT)
    for first, last in ((0, K), (128, K), (0, 128), (256, K)):
        if first < last <= K:
            mine, rows = slice(3 * first, 3 * last), slice(first, last)
            found = parts_product(parts[0][mine, 5:20].T, parts[1][mine])
            assert missed(found, left[5:20, rows], right[rows]) < 2e-5
    out = torch.zeros(3 * K, 7, dtype=torch.bfloat16)
    assert grouped_parts(right, LOW_RIGHT, out) is out
    assert torch.equal(out, parts[1])
