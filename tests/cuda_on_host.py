"""Sources of CUDA kernels, compiled as a library of the host that runs them thread by thread."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import bitmill_kernels.trellis

FOLDER = Path(bitmill_kernels.trellis.__file__).parent


def host_library(kernels: str, calls: str, folder: Path) -> ctypes.CDLL:
    """The library; skips the test where there is no g++.

    kernels: a source of `bitmill_kernels.trellis` up to what launches it on a GPU, so without the
    brace that ends its namespace. calls: functions of C that launch its kernels.
    folder: takes the source and the library.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    shared = (FOLDER / "circles_cuda.h").read_text()
    shared = re.sub(r"asm volatile\(.*?;\n}", "mma(c, a, b0, b1);\n}", shared, flags=re.DOTALL)
    kernels = kernels.replace('#include "circles_cuda.h"', shared)
    kernels = re.sub(r"#include <cuda.*>\n|#pragma once\n", "", kernels)
    header = Path(__file__).with_suffix(".h")
    (folder / "host.cpp").write_text(f'#include "{header}"\n{kernels}}}\n{calls}')
    command = [
        "g++",
        "-std=c++20",
        "-O2",
        "-fno-strict-aliasing",
        "-w",
        "-shared",
        "-fPIC",
        "-pthread",
        "-mf16c",
    ]
    subprocess.run([*command, "-o", folder / "host.so", folder / "host.cpp"], check=True)
    return ctypes.CDLL(str(folder / "host.so"))


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Of a tensor's memory, as C takes it."""
    return ctypes.c_void_p(tensor.data_ptr())
