"""Cases for Triton's interpreter; run by `test_interpreter.py` in a process of its own."""

import pytest
import torch

from bitmill_kernels import reference
from bitmill_kernels.layout import WIDTHS
from bitmill_kernels.matmul.decode_triton import Tile, build_tables, launch_decode
from bitmill_kernels.matmul.prologue import prologue_reference, prologue_triton
from bitmill_kernels.matmul.runtime import PackedWeight, build_runtime
from bitmill_kernels.pack import pack_codes, pack_zeros
from kernel_cases import random_linear

CPU = torch.device("cpu")


def run(runtime, x, *, split=1, rows=64, tokens=16, bias=None, dtype=None):
    T = x.shape[0]
    tables = build_tables(runtime, Tile(rows, split, 4, 2))
    inputs = torch.full((T, 256 * runtime.pair_count), float("nan"), dtype=torch.float16)
    sums = torch.full((2 * runtime.pair_count, tokens), float("nan"))
    factor = torch.full((T,), float("nan"))
    prologue_triton(x, runtime, inputs, sums, factor)
    partial = torch.full((split * tables.tiles.shape[0] * rows * tokens,), float("nan"))
    y = torch.full((T, runtime.N), float("nan"), dtype=dtype or x.dtype)
    for _ in range(2):
        launch_decode(runtime, tables, inputs, sums, factor, bias, partial, y, asm=False)
        assert not tables.counters.any()
    return y


def relative_error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("width", WIDTHS)
def test_each_width_alone(width):
    widths = [width] * 3
    weight, *parts = random_linear(70, 300, widths, seed=width)
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(width)) + 0.5
    y = run(build_runtime([weight], CPU), x, dtype=torch.float32)
    assert relative_error(y, reference.mixed_matmul(x, *parts, widths)) < 3e-4


@pytest.mark.parametrize("split", [1, 3])
def test_a_mix_with_order_bias_and_split(split):
    widths = (3, 2, 4, 8, 1, 3, 6, 5, 3)
    weight, *parts = random_linear(130, 1100, widths, seed=7, ordered=True)
    x = torch.randn(16, 1100, generator=torch.Generator().manual_seed(3)).bfloat16()
    bias = torch.randn(130, generator=torch.Generator().manual_seed(4))
    y = run(build_runtime([weight], CPU), x, split=split, bias=bias, dtype=torch.float32)
    exact = reference.mixed_matmul(x, *parts, widths, order=weight.order, bias=bias)
    assert relative_error(y, exact) < 3e-4


def test_stacked_siblings_of_different_widths():
    a, *a_parts = random_linear(40, 512, (2, 3, 4, 2), seed=1, ordered=True)
    b, *b_parts = random_linear(129, 512, (3, 3, 8, 2), seed=2)
    b = PackedWeight(b.tensors, b.widths, b.N, b.K, a.order)
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(5)).half()
    y = run(build_runtime([a, b], CPU), x, split=2, dtype=torch.float32)
    exact = torch.cat(
        [
            reference.mixed_matmul(x, *a_parts, a.widths, order=a.order),
            reference.mixed_matmul(x, *b_parts, b.widths, order=a.order),
        ],
        dim=1,
    )
    assert relative_error(y, exact) < 3e-4


def test_dropped_groups_and_linears_have_no_part():
    a, *a_parts = random_linear(40, 600, (0, 3, 0, 2, 0), seed=1, ordered=True)
    b, *_ = random_linear(9, 600, (0,) * 5, seed=2)
    b = PackedWeight(b.tensors, b.widths, b.N, b.K, a.order)
    x = torch.randn(3, 600, generator=torch.Generator().manual_seed(5)).half()
    runtime = build_runtime([a, b], CPU)
    assert [len(member.pairs) for member in runtime.members] == [2, 1]
    y = run(runtime, x, dtype=torch.float32)
    exact = reference.mixed_matmul(x, *a_parts, a.widths, order=a.order)
    assert relative_error(y[:, :40], exact) < 3e-4
    assert not y[:, 40:].any()


@pytest.mark.parametrize("tokens", [8, 32, 64])
def test_other_token_tiles(tokens):
    weight, *parts = random_linear(20, 256, (3, 4), seed=1)
    x = torch.randn(tokens - 3, 256, generator=torch.Generator().manual_seed(1))
    y = run(build_runtime([weight], CPU), x, tokens=tokens)
    assert relative_error(y, reference.mixed_matmul(x, *parts, (3, 4))) < 3e-4


@pytest.mark.parametrize("rows", [16, 32, 128])
def test_tiles_of_other_rows(rows):
    weight, *parts = random_linear(150, 512, (3, 4, 3, 4), seed=1)
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(1))
    y = run(build_runtime([weight], CPU), x, rows=rows, split=2)
    assert relative_error(y, reference.mixed_matmul(x, *parts, (3, 4, 3, 4))) < 3e-4


@pytest.mark.parametrize("tile", [Tile(256, 1, 4, 2), Tile(128, 3, 4, 2)], ids=["rows", "slices"])
def test_a_tile_that_does_not_suit_the_weight_is_refused(tile):
    weight, *_ = random_linear(150, 512, (3, 4, 3, 4))
    other, *_ = random_linear(100, 512, (3, 4, 3, 4))
    with pytest.raises(ValueError, match=r"\[256, 128\] of every linear.*\[2, 2\]"):
        build_tables(build_runtime([weight, other], CPU), tile)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_field_gives_back_its_code_exactly(width):
    """One-hot inputs of 1 read single columns: scale 1 and zero 0 give back the code itself."""
    codes = torch.arange(256).remainder(1 << width).to(torch.uint8).repeat(5, 1)
    tensors = pack_codes(codes, [width] * 2)
    tensors |= pack_zeros(torch.zeros(2, 5, dtype=torch.uint8), [width] * 2)
    tensors["scales"] = torch.ones(2, 5, dtype=torch.float16)
    runtime = build_runtime([PackedWeight(tensors, (width,) * 2, 5, 256)], CPU)
    y = run(runtime, torch.eye(256)[::4], tokens=64)
    assert torch.equal(y.t().to(torch.uint8), codes[:, ::4])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1e30])
def test_inputs_of_any_size_keep_their_precision(scale):
    weight, *parts = random_linear(8, 256, (2, 8), seed=3)
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(9)).bfloat16() * scale
    y = run(build_runtime([weight], CPU), x, dtype=torch.float32)
    exact = reference.mixed_matmul(x, *parts, (2, 8))
    assert (y.double() - exact).norm() <= 3e-4 * exact.norm()


def test_the_prologue_equals_its_twin():
    weight, *_ = random_linear(8, 700, (1, 2, 3, 5, 8, 4), seed=3, ordered=True)
    runtime = build_runtime([weight], CPU)
    x = torch.randn(3, 700, generator=torch.Generator().manual_seed(2)).half()
    rows, sums, factor = prologue_reference(x, runtime)
    got = [torch.full_like(rows, 9), torch.full_like(sums, 9), torch.full_like(factor, 9)]
    prologue_triton(x, runtime, *got)
    assert torch.equal(got[0], rows)
    assert torch.allclose(got[1], sums, rtol=1e-5)
    assert torch.equal(got[2], factor)
