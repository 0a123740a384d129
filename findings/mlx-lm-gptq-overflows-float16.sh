#!/usr/bin/env bash
# mlx-lm 0.32.2: GPTQ of a float16 model makes every output of a layer NaN, without a word.
#
# `mlx_lm.quant.gptq` forms the products of a batch's inputs, 8 windows of 512 tokens by default, in the type of
# the activations, which in float16 ends at 65,504; only what batches have in sum is float32. Inputs of size 4 fill
# it within a batch, one channel of size 50, as language models have them, within 27 tokens. The mean of the
# diagonal is then infinite and is added to all of it as damping, so no factor is a number, nor any scale behind
# the first group. The model is packed and saved as any other. In bfloat16 and float32 the same weights and inputs
# come out as they should, with less than a fifth of rounding's error, and rounding itself does in float16.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2 numpy==2.4.6
"$work/venv/bin/python" - 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
from importlib.metadata import version

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.quant.gptq import gptq_quantize

WIDTH, GROUP = 128, 32
random = np.random.default_rng(0)
weight = (0.05 * random.normal(size=(WIDTH, WIDTH))).astype(np.float32)
causes = random.normal(size=(8, 512, 32)) @ random.normal(size=(32, WIDTH))
inputs = (causes + 0.3 * random.normal(size=causes.shape)).astype(np.float32)


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layer.weight = mx.array(weight).astype(kind)

    def __call__(self, x):
        return self.layer(x)


def read(layer):
    parts = layer.weight, layer.scales, layer.biases
    return np.array(mx.dequantize(*parts, group_size=GROUP, bits=4).astype(mx.float32))


def rounded(kind):
    model = Model(kind)
    nn.quantize(model, group_size=GROUP, bits=4)
    return read(model.layer)


def calibrated(kind):
    model = Model(kind)
    gptq_quantize(model, mx.array(inputs).astype(kind), 4, GROUP, 4, GROUP)
    return read(model.layer)


right = inputs.reshape(-1, WIDTH) @ weight.T
print(f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')}: 4 bits, {len(right)} tokens,", end=" ")
print(f"inputs of size {np.sqrt((inputs**2).mean()):.1f}")
errors = {}
for kind in (mx.float32, mx.bfloat16, mx.float16):
    for name, way in (("rounding", rounded), ("GPTQ", calibrated)):
        found = way(kind)
        made = inputs.reshape(-1, WIDTH) @ found.T
        errors[name, kind] = error = float(((made - right) ** 2).sum() / (right**2).sum())
        print(f"  {name} in {str(kind).split('.')[-1]}: NaN {np.isnan(found).mean():.0%} of the weights and", end=" ")
        print(f"{np.isnan(made).mean():.0%} of the outputs, squared error {error:.6f}")
        lost = name == "GPTQ" and kind == mx.float16
        assert np.isnan(made).all() == lost, "sums are held in a larger type now"
for kind in (mx.float32, mx.bfloat16):
    assert errors["GPTQ", kind] < errors["rounding", kind] / 4
PY
