"""The CUDA kernels of trellis codes compile without a GPU."""

import shutil
import subprocess

import pytest

from bitmill_kernels.trellis import product_cuda


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize(("source", "kernels"), [("viterbi_cuda.cu", 22), ("product_cuda.cu", 11)])
def test_the_kernels_compile_for_sm_90_without_spills(source, kernels, tmp_path):
    folder = product_cuda.__file__.rpartition("/")[0]
    flags = ["-std=c++17", "-O3", "-gencode", "arch=compute_90,code=sm_90", "-Xptxas", "-v"]
    command = ["nvcc", *flags, "-cubin", "-o", tmp_path / "kernels.cubin", f"{folder}/{source}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spilled = [
        int(line.split("bytes spill stores")[0].split(",")[-1])
        for line in done.stderr.splitlines()
        if "bytes spill stores" in line
    ]
    assert len(spilled) == kernels
    assert not any(spilled)
