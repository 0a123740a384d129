#!/usr/bin/env bash
# MLX 0.32.4: `nn.quantize(model, mode="nvfp4")` turns small weights into zeros, without a word.
#
# NVFP4 stores a scale of type E4M3 for each 16 weights, whose smallest value is 2^-9, and below 2^-6 it
# has less than three bits of mantissa. The format means a second, float32 scale for the whole tensor to
# bring scales into that range; `mx.quantize` takes one (`global_scale`), but the layers of `mlx.nn`
# neither make nor store it. At a standard deviation of 0.02, a usual one of language models' weights,
# outputs have 1.1 times the error that weights of size 1 have, at 0.002 nearly everything is gone (0.93
# of the energy), where "mxfp4" and "affine" lose the same at every size. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install "mlx[cpu]==0.32.4"
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn

mx.random.seed(0)
weight, x = mx.random.normal((256, 1024)), mx.random.normal((64, 1024))


def error(deviation: float, mode: str, group_size: int) -> float:
    """Squared error of a quantized layer's outputs over the square of the outputs."""
    model = nn.Sequential(nn.Linear(1024, 256, bias=False))
    model.layers[0].weight = weight * deviation
    right = model(x)
    nn.quantize(model, group_size=group_size, bits=4, mode=mode)
    return (((model(x) - right) ** 2).sum() / (right**2).sum()).item()


print(f"mlx {version('mlx')}, relative squared error of outputs")
for mode, group_size in (("nvfp4", 16), ("mxfp4", 32), ("affine", 32)):
    found = {deviation: round(error(deviation, mode, group_size), 4) for deviation in (1.0, 0.02, 0.002)}
    print(f"{mode:7} by standard deviation of the weights: {found}")
    if mode == "nvfp4":
        assert found[1.0] < 0.012 and found[0.002] > 0.8, "small weights survive now"
    else:
        assert found[0.002] < 1.1 * found[1.0]
PY
