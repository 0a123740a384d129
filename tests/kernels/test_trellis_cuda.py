"""The CUDA kernels of trellis codes compile without a GPU."""

import shutil
import subprocess

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

from bitmill_kernels.trellis import product_cuda


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize(
    ("source", "kernels", "most_spilled"),
    [
        ("viterbi_cuda.cu", 28, 0),
        ("product_cuda.cu", 14, 0),
        ("decode_cuda.cu", 6, 0),
        ("batch_cuda.cu", 8, 10),
    ],
)
def test_the_kernels_compile_for_sm_90_without_spills(source, kernels, most_spilled, tmp_path):
    folder = product_cuda.__file__.rpartition("/")[0]
    # As torch compiles them: without the types' own conversions and operators.
    flags = [*COMMON_NVCC_FLAGS, "-std=c++17", "-O3", "-Xptxas", "-v"]
    flags += ["-gencode", "arch=compute_90a,code=sm_90a"]
    command = ["nvcc", *flags, "-cubin", "-o", tmp_path / "kernels.cubin", f"{folder}/{source}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spilled = [
        int(line.split("bytes spill stores")[0].split(",")[-1])
        for line in done.stderr.splitlines()
        if "bytes spill stores" in line
    ]
    assert len(spilled) == kernels
    assert max(spilled) <= most_spilled
    assert "wgmma" not in done.stderr, "ptxas could not leave products under way"
