#!/usr/bin/env bash
# gguf 0.19.0, mlx 0.32.4 and torchao 0.18.0 store one and the same block in MXFP4 with different scales,
# and gguf and torchao (as it is set by default) lose up to a quarter of the block's largest weight.
#
# 32 weights share a power of two; a weight itself is at most 6. By the rule of the OCP specification the
# power is that of the largest weight, less 2, so a largest weight between 6 and 8 is cut down to 6: 7.9
# is read as 6. MLX takes the next power where 6 is passed, so 7.9 is read as 8. On Gaussian weights
# neither is better on the whole, but the values that are cut are the largest of their block. MLX differs
# in ties, too: 3.5 lies between 3 and 4 and becomes 3, not the even code 4. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install "mlx[cpu]==0.32.4" gguf==0.19.0
pip install --no-deps torchao==0.18.0
"$work/venv/bin/python" - 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
from importlib.metadata import version

import gguf
import mlx.core as mx
import numpy as np
import torch
from torchao.prototype.mx_formats.mx_tensor import MXTensor

KIND = gguf.GGMLQuantizationType.MXFP4


def by_gguf(x):
    return gguf.quants.dequantize(gguf.quants.quantize(x, KIND), KIND)


def by_mlx(x):
    made = mx.quantize(mx.array(x), mode="mxfp4")
    return np.array(mx.dequantize(*made, mode="mxfp4").astype(mx.float32))


def by_torchao(x):
    return MXTensor.to_mx(torch.tensor(x), torch.float4_e2m1fn_x2, 32).dequantize(torch.float32).numpy()


ways = {"gguf": by_gguf, "mlx": by_mlx, "torchao": by_torchao}
print({name: version(name) for name in ways})
read = {}
for largest in (5.9, 6.5, 7.0, 7.9):
    block = np.full((1, 32), 0.25, np.float32)
    block[0, 0] = largest
    read[largest] = {name: float(way(block)[0, 0]) for name, way in ways.items()}
    print(f"a block's largest weight of {largest} is read as {read[largest]}")
gaussian = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)
print("mean squared error on a Gaussian", {n: round(float(((w(gaussian) - gaussian) ** 2).mean()), 5) for n, w in ways.items()})
assert read[5.9] == {"gguf": 6, "mlx": 6, "torchao": 6}
assert read[7.9] == {"gguf": 6, "mlx": 8, "torchao": 6}, "scales are chosen otherwise now"
assert read[7.0]["mlx"] == 6, "ties go to the even code now"
PY
