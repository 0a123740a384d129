#!/usr/bin/env bash
# ggml (the build in pywhispercpp 1.5.1): an importance matrix of ones makes most types better.
#
# `llama-quantize --imatrix` is meant to tell which inputs matter. But whether one is given also chooses
# the algorithm: without it Q4_0, Q4_1, Q5_0 and Q5_1 take the range of a block, with it they search for
# the scale; the K types search otherwise, too. A matrix that says nothing, all ones, takes 10 to 20
# percent off the plain squared error of Q4_0, Q4_1, Q5_0, Q5_1 and Q2_K on Gaussian weights. Q8_0 and
# MXFP4 ignore the matrix. "With against without imatrix" thus compares two algorithms, and a file
# quantized without one is worse than it needs to be, calibrated or not. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install gguf==0.19.0 numpy
pip install --no-deps pywhispercpp==1.5.1
"$work/venv/bin/python" - <<'PY'
import ctypes
import sysconfig
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np

ROWS, COLUMNS = 64, 4096
ggml = ctypes.CDLL(str(Path(sysconfig.get_path("platlib"), "libggml-base.so.0")))
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *2 * [ctypes.c_void_p], *3 * [ctypes.c_int64], ctypes.c_void_p]
ggml.ggml_version.restype = ctypes.c_char_p
weight = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
ones = np.ones(COLUMNS, np.float32)


def error(name: str, importance: np.ndarray | None) -> float:
    """Squared error over the squared weights."""
    kind = gguf.GGMLQuantizationType[name]
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.zeros((ROWS, COLUMNS // size * stored), np.uint8)
    address = None if importance is None else importance.ctypes.data
    ggml.ggml_quantize_chunk(int(kind), weight.ctypes.data, blocks.ctypes.data, 0, ROWS, COLUMNS, address)
    return float(((gguf.dequantize(blocks, kind) - weight) ** 2).sum() / (weight**2).sum())


print(f"pywhispercpp {version('pywhispercpp')}, ggml {ggml.ggml_version().decode()}: relative squared error")
saved = {}
for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_NL"):
    without, flat = error(name, None), error(name, ones)
    saved[name] = 1 - flat / without
    print(f"{name:6} without a matrix {without:.3g}, with one of ones {flat:.3g}: {100 * saved[name]:.0f}% less")
assert all(saved[name] > 0.08 for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K")), "both are alike now"
assert saved["Q8_0"] == saved["MXFP4"] == 0
PY
