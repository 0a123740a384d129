#!/usr/bin/env bash
# numpy 2.3.5 with ml_dtypes 0.6.0: the mean of a bfloat16 tensor is a quarter of what it should be.
#
# `safetensors.numpy.load_file` returns bfloat16 and float8 tensors in ml_dtypes' types, which jax brings too,
# and numpy adds them up one by one in their own type, `mean` and `std` included. A sum of bfloat16 stops
# where the next term is less than half a step: a thousand ones are 256, the mean size of 4,096 Gaussian
# weights is 0.25 instead of 0.80, their standard deviation 0.70. float8_e4m3fn stops at 16; int4 wraps: ten
# ones are -6, their mean 0. numpy's own short types are right: float16's mean goes through float32, int8's
# sum is int64. So is jax on the same values. Convert to float32 first. No word is said. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install numpy==2.3.5 ml_dtypes==0.6.0 safetensors==0.8.0 jax==0.10.2
JAX_PLATFORMS=cpu "$work/venv/bin/python" - "$work" <<'PY'
import sys
import warnings
from importlib.metadata import version

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

warnings.simplefilter("error")
print({name: version(name) for name in ("numpy", "ml_dtypes", "safetensors", "jax")})
ones = {}
for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float16):
    found = np.ones(1000, kind)
    ones[np.dtype(kind).name] = float(found.sum()), float(found.mean())
print("a thousand ones, sum and mean:", ones)
assert [total for total, _ in ones.values()] == [256, 16, 8, 1000], "sums go on now"
assert ones["bfloat16"][1] < 0.26 and ones["float16"][1] == 1
for kind in (ml_dtypes.int4, ml_dtypes.uint4, np.int8):
    found = np.ones(10 if kind is not ml_dtypes.uint4 else 20, kind)
    print(f"{len(found)} ones of {np.dtype(kind).name}: sum {found.sum()}, mean {found.mean()}")
    assert int(found.sum()) == {"int4": -6, "uint4": 4, "int8": 10}[np.dtype(kind).name]

weight = np.random.default_rng(0).normal(size=4096).astype(np.float32)
save_file({"weight": weight.astype(ml_dtypes.bfloat16)}, f"{sys.argv[1]}/model.safetensors")
stored = load_file(f"{sys.argv[1]}/model.safetensors")["weight"]
assert stored.dtype == ml_dtypes.bfloat16
ways = {"float32": weight, "bfloat16": stored, "bfloat16 in jax": jnp.asarray(stored)}
read = {name: (round(float(abs(x).mean()), 3), round(float(x.std()), 3)) for name, x in ways.items()}
print("4,096 Gaussian weights, mean size and standard deviation:", read)
assert abs(read["bfloat16 in jax"][0] - read["float32"][0]) < 0.005
assert read["bfloat16"][0] < 0.3 and read["bfloat16"][1] < 0.8, "numpy adds in more now"
PY
