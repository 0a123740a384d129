#!/usr/bin/env bash
# torch 2.13.0 and ml_dtypes 0.6.0 round float64 to a short type twice, numpy 2.3.5 once.
#
# Both go through float32, whose rounding can land on the middle between two neighbours, which the
# second rounding then takes to the even one. 1 + 2^-11 + 2^-30 lies above the middle between two
# float16 values: numpy stores the upper one, torch the lower one, half a step and more away. The same
# holds for bfloat16 and float8_e4m3fn, in ml_dtypes too, which jax is built on. Of random numbers one in
# 16,384 becomes another float16 that way, since float32 has 13 bits more. So weights that were
# "computed in float64 and rounded once" are not, and differ between numpy and torch.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0
pip install numpy==2.3.5 ml_dtypes==0.6.0
"$work/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np
import torch


def middle(bits):
    """A little above the middle between 1 and the next number with so many bits behind the point."""
    return 1 + 2.0 ** -(bits + 1) + 2.0**-30


def cast(value, kind):
    return float(torch.tensor(value, dtype=torch.float64).to(kind).double())


found = {
    "numpy float16": (float(np.float64(middle(10)).astype(np.float16)), 1 + 2**-10),
    "torch float16": (cast(middle(10), torch.float16), 1.0),
    "torch bfloat16": (cast(middle(7), torch.bfloat16), 1.0),
    "torch float8_e4m3fn": (cast(middle(3), torch.float8_e4m3fn), 1.0),
    "ml_dtypes bfloat16": (float(np.float64(middle(7)).astype(ml_dtypes.bfloat16)), 1.0),
    "ml_dtypes float8_e4m3fn": (float(np.float64(middle(3)).astype(ml_dtypes.float8_e4m3fn)), 1.0),
}
for name, (value, expected) in found.items():
    print(f"{name}: {value}")
    assert value == expected, "it rounds otherwise now"
PY
