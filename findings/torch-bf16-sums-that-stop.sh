#!/usr/bin/env bash
# torch 2.13.0, CPU: of functions that add into the same place, half stop at 256 in bfloat16.
#
# A thousand ones added into one number: `index_add_`, `index_put_(accumulate=True)` and
# `put_(accumulate=True)` give 256, because 256 + 1 is 256 there; `scatter_add_` and
# `scatter_reduce_` give 1000, as `sum` and `cumsum` do, because they add in float32 and round at the
# end. In float16 the first stop at 2048, and the others overflow to infinity where the sum does.
# Mixtures of experts add the outputs of experts by `index_add_`, statistics of tokens do too; the name
# of the function tells nothing. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
"$work/venv/bin/python" - <<'PY'
import torch

ADDERS = {
    "index_add_": lambda to, at, of: to.index_add_(0, at, of),
    "index_put_": lambda to, at, of: to.index_put_((at,), of, accumulate=True),
    "put_": lambda to, at, of: to.put_(at, of, accumulate=True),
    "scatter_add_": lambda to, at, of: to.scatter_add_(0, at, of),
    "scatter_reduce_": lambda to, at, of: to.scatter_reduce_(0, at, of, "sum"),
    "sum": lambda _, at, of: of.sum(),
    "cumsum": lambda _, at, of: of.cumsum(0)[-1],
}
STOPS = ("index_add_", "index_put_", "put_")


def added(name, count, dtype):
    ones, places = torch.ones(count, dtype=dtype), torch.zeros(count, dtype=torch.long)
    return float(ADDERS[name](torch.zeros(1, dtype=dtype), places, ones))


for name in ADDERS:
    short, long = added(name, 1000, torch.bfloat16), added(name, 4000, torch.float16)
    print(f"{name}: {short:g} of 1000 in bfloat16, {long:g} of 4000 in float16")
    assert (short, long) == ((256, 2048) if name in STOPS else (1000, 4000)), "it adds otherwise now"
PY
