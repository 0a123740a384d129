"""What surrounds the CUDA dequantize kernel and needs no GPU."""

from pathlib import Path

import pytest
import torch

from bitmill_kernels.matmul import dequantize_cuda
from bitmill_kernels.matmul.dequantize_cuda import _parts
from bitmill_kernels.matmul.dequantize_triton import row_runs
from bitmill_kernels.matmul.runtime import build_runtime
from kernel_cases import random_linear

CPU = torch.device("cpu")


def test_an_argument_structure_has_the_fields_of_the_kernels():
    source = Path(dequantize_cuda.__file__).with_name("dequantize_cuda.cu").read_text()
    body = source.split("struct DequantizeArguments {")[1].split("};")[0]
    fields = [line.split("//")[0].strip() for line in body.splitlines() if ";" in line]
    names = [field.rstrip(";").split()[-1].lstrip("*") for field in fields]
    assert names == [name for name, _ in dequantize_cuda._Arguments._fields_]


@pytest.mark.parametrize("max_rows", [64, 200, 1000])
def test_parts_cover_every_row_of_every_member_once(max_rows):
    widths = [(3, 2, 4), (2, 2, 2), (5, 8, 1)]
    rows = [300, 7, 130]
    weights = [random_linear(N, 384, width)[0] for N, width in zip(rows, widths, strict=True)]
    weight = build_runtime(weights, CPU)
    seen = []
    for run in row_runs(weight, max_rows):
        filled = 0
        for part in _parts(weight.members, run):
            assert part.offset == filled
            seen += [(part.first_pair, part.pairs, part.row + i) for i in range(part.rows)]
            filled += part.rows
        assert filled == run.rows
    first_pairs = [0, len(weight.members[0].pairs), sum(len(m.pairs) for m in weight.members[:2])]
    assert seen == [
        (first, len(member.pairs), row)
        for first, member in zip(first_pairs, weight.members, strict=True)
        for row in range(member.N)
    ]
