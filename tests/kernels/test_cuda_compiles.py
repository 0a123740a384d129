"""The CUDA kernels compile without a GPU, for Hopper without spills, where there is nvcc.

What takes nvcc more than twenty seconds is marked slow.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

import bitmill_kernels.matmul

FOLDER = Path(bitmill_kernels.matmul.__file__).parents[1]

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="CUDA kernels are compiled by nvcc: not on this machine"
)
slow = pytest.mark.slow


def machine_code(source, architecture, tmp_path, *flags):
    """What nvcc makes of a source, as torch compiles it, and what it says of it."""
    # Without the types' own conversions and operators, as torch has it.
    flags = [*COMMON_NVCC_FLAGS, "-std=c++17", *flags]
    flags.append(f"-gencode=arch=compute_{architecture},code=sm_{architecture}")
    output = tmp_path / "kernels.cubin"
    command = ["nvcc", *flags, "-cubin", "-o", output, FOLDER / source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output.read_bytes(), done.stderr


@pytest.mark.parametrize(
    ("source", "kernels", "most_spilled"),
    [
        pytest.param("matmul/decode_cuda.cu", 9, 300, marks=slow),
        pytest.param("matmul/batch_cuda.cu", 11, 16, marks=slow),
        ("matmul/dequantize_cuda.cu", 3, 0),
        pytest.param("trellis/viterbi_cuda.cu", 28, 0, marks=slow),
        ("trellis/product_cuda.cu", 14, 0),
        ("trellis/decode_cuda.cu", 6, 0),
        pytest.param("trellis/batch_cuda.cu", 8, 10, marks=slow),
    ],
)
def test_kernels_compile_for_hopper_with_few_spills(source, kernels, most_spilled, tmp_path):
    _, said = machine_code(source, "90a", tmp_path, "-O3", "-Xptxas", "-v")
    spilled = [
        int(line.split("bytes spill stores")[0].split(",")[-1])
        for line in said.splitlines()
        if "bytes spill stores" in line
    ]
    assert len(spilled) == kernels
    assert max(spilled) <= most_spilled
    assert "wgmma" not in said, "ptxas could not leave products under way"


@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        *(("trellis/product_cuda.cu", one) for one in (80, 89, 100, 120)),
        *(("matmul/dequantize_cuda.cu", one) for one in (100, 120)),
        ("trellis/viterbi_cuda.cu", 80),
        ("trellis/viterbi_cuda.cu", 120),
        *(pytest.param("trellis/viterbi_cuda.cu", one, marks=slow) for one in (89, 100)),
        *(pytest.param("matmul/decode_cuda.cu", one, marks=slow) for one in (100, 120)),
        pytest.param("matmul/batch_cuda.cu", 100, marks=slow),
    ],
)
def test_kernels_compile_for_other_architectures(source, architecture, tmp_path):
    binary, _ = machine_code(source, architecture, tmp_path)
    assert binary[:4] == b"\x7fELF"
