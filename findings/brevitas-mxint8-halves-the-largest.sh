#!/usr/bin/env bash
# brevitas 0.13.4: `MXInt8Weight` and `MXInt8Act` cut a block's large values down to half of its largest one.
#
# In MXINT8 (OCP Microscaling) 32 values share a power of two, that of the largest of them, and have 6 bits behind
# the point: codes reach 127 / 64, nearly twice that power. Brevitas rounds the power down as the format does, but
# divides it by 128, as for a range that ends there: codes reach 127 / 128 of it, and all that is larger is cut.
# 1.99 is read as 0.99, 1.01 too. On Gaussian weights the squared error is 2.6 percent, 400 times what the format
# itself and the library's own Int8WeightPerChannelFloat cost, and 30 times that of MXFloat8e4m3Weight, which has
# three bits of mantissa. Nothing is said. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install brevitas==0.13.4
"$work/venv/bin/python" - 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
from importlib.metadata import version

import brevitas.nn as qnn
import torch
from brevitas.quant import Int8WeightPerChannelFloat
from brevitas.quant.mx_quant_ocp import MXFloat8e4m3Weight, MXInt8Act, MXInt8Weight

torch.manual_seed(0)


def weights(quantizer, values):
    layer = qnn.QuantLinear(values.shape[1], values.shape[0], bias=False, weight_quant=quantizer).eval()
    layer.weight.data = values.clone()
    return layer.quant_weight().value.detach()


def activations(quantizer, values):
    return qnn.QuantIdentity(act_quant=quantizer, group_dim=1).eval()(values).detach()


def by_the_format(values):
    blocks = values.unflatten(1, (-1, 32))
    step = 2.0 ** (blocks.abs().amax(2, keepdim=True).log2().floor() - 6)
    return ((blocks / step).round().clamp(-128, 127) * step).flatten(1)


def error(read, right):
    return float(((read - right) ** 2).sum() / (right**2).sum())


print(f"brevitas {version('brevitas')}")
block = torch.full((1, 32), 0.25)
block[0, :4] = torch.tensor([1.99, 1.5, 1.01, 0.5])
for name, read in (
    ("MXInt8Weight", weights(MXInt8Weight, block)),
    ("MXInt8Act", activations(MXInt8Act, block)),
    ("the format", by_the_format(block)),
):
    print(f"  {name} reads 1.99, 1.5, 1.01, 0.5 as", [round(value, 3) for value in read[0, :4].tolist()])
    expected = 1.984375 if name == "the format" else 0.9921875
    assert float(read[0, 0]) == expected, "it reads otherwise now"
gaussian = torch.randn(64, 1024)
errors = {
    "MXInt8Weight": error(weights(MXInt8Weight, gaussian), gaussian),
    "MXInt8Act": error(activations(MXInt8Act, gaussian), gaussian),
    "the format": error(by_the_format(gaussian), gaussian),
    "Int8WeightPerChannelFloat": error(weights(Int8WeightPerChannelFloat, gaussian), gaussian),
    "MXFloat8e4m3Weight": error(weights(MXFloat8e4m3Weight, gaussian), gaussian),
}
for name, value in errors.items():
    print(f"  squared error on a Gaussian by {name}: {value:.6f}")
assert errors["MXInt8Weight"] > 200 * errors["the format"]
assert errors["MXInt8Act"] > 200 * errors["the format"]
assert errors["MXInt8Weight"] > 20 * errors["MXFloat8e4m3Weight"]
PY
