"""Cases for Triton's interpreter; run by `test_interpreter.py` in a process of its own."""

import pytest
import torch

from bitmill_kernels import reference
from bitmill_kernels.layout import WIDTHS
from bitmill_kernels.matmul.dequantize_triton import Dequantizer, DequantizeTile
from bitmill_kernels.matmul.runtime import build_runtime
from kernel_cases import random_linear

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "rows", "runs"),
    [
        (torch.float16, 64, [(0, 64), (64, 9)]),
        (torch.float32, 64, [(0, 64), (64, 9)]),
        (torch.float16, 16, [(0, 64), (64, 9)]),
        (torch.float16, 128, [(0, 73)]),
    ],
)
def test_stacked_linears_of_every_width_equal_the_reference(dtype, rows, runs):
    K = 7 * 128 + 50
    a, *a_parts = random_linear(70, K, (*WIDTHS, 3), seed=1)
    b, *b_parts = random_linear(3, K, (8, 1, 1, 5, 6, 2, 2, 4), seed=2)
    dequantizer = Dequantizer(build_runtime([a, b], CPU), max_rows=64, tile=DequantizeTile(rows, 4))
    out = torch.full((73, K), float("nan"), dtype=dtype)
    for run in dequantizer.runs:
        dequantizer(run, out[run.first : run.first + run.rows])
    exact = torch.cat(
        [reference.dequantize(*a_parts, a.widths), reference.dequantize(*b_parts, b.widths)]
    )
    assert torch.equal(out, exact.to(dtype))
    assert [(run.first, run.rows) for run in dequantizer.runs] == runs
