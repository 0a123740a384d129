#!/usr/bin/env bash
# AMD Quark 0.13: `Uint8PerChannelSpec(ch_axis=0)`, as it is set by default, turns every negative weight into zero.
#
# Its default is `symmetric=True`. The observer then takes the largest size for scale and zero for zero point, as for
# signed codes, but unsigned ones begin at zero: half of the weights are gone, and half of their energy, where
# `symmetric=False` costs 0.00004 of it. All other unsigned specs do the same where `symmetric=True` is asked for, as
# the example in Uint4PerChannelSpec's own docstring does; with a zero point in the middle these would be the codes of
# the signed specs. `FP8E5M3PerTensorSpec`, a type without a sign and without that setting, does it, too. Outputs are
# finite, `freeze` goes through, nothing is said. Fails if that changes. Needs a C++ compiler, as importing Quark does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install amd-quark==0.13 transformers==5.24.0 accelerate==1.15.0 ninja
"$work/venv/bin/python" - >"$work/said" 2>&1 <<'PY' || { tail -30 "$work/said"; exit 1; }
from importlib.metadata import version

import torch
from quark.torch import ModelQuantizer
from quark.torch.quantization.config.config import (
    DataTypeSpec,
    FP8E5M3PerTensorSpec,
    Int8PerChannelSpec,
    QConfig,
    QLayerConfig,
    Uint4PerChannelSpec,
    Uint8PerChannelSpec,
)

torch.manual_seed(0)
WEIGHT = 0.02 * torch.randn(128, 256)


def read(spec: DataTypeSpec) -> torch.Tensor:
    """The weights with which a quantized and frozen layer computes, [128, 256]."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 128, bias=False))
    model[0].weight.data = WEIGHT.clone()
    config = QConfig(global_quant_config=QLayerConfig(weight=spec.to_quantization_spec()))
    quantizer = ModelQuantizer(config)
    made = quantizer.freeze(quantizer.quantize_model(model, [torch.randn(4, 256)]))
    return made(torch.eye(256)).T.detach()


found = {}
for name, spec in {
    "Uint8PerChannelSpec(ch_axis=0)": Uint8PerChannelSpec(ch_axis=0),
    "Uint8PerChannelSpec(ch_axis=0, symmetric=False)": Uint8PerChannelSpec(ch_axis=0, symmetric=False),
    "Int8PerChannelSpec(ch_axis=0)": Int8PerChannelSpec(ch_axis=0),
    "Uint4PerChannelSpec(ch_axis=0, symmetric=True)": Uint4PerChannelSpec(ch_axis=0, symmetric=True, is_dynamic=False),
    "Uint4PerChannelSpec(ch_axis=0)": Uint4PerChannelSpec(ch_axis=0, is_dynamic=False),
    "FP8E5M3PerTensorSpec()": FP8E5M3PerTensorSpec(),
}.items():
    weight = read(spec)
    found[name] = float(((weight - WEIGHT) ** 2).sum() / (WEIGHT**2).sum()), int((weight < 0).sum())
    print(f"FOUND {name}: squared error {found[name][0]:.5f}, negative weights {found[name][1]} of {int((WEIGHT < 0).sum())}")
print("FOUND amd-quark", version("amd-quark"))
for name in ("Uint8PerChannelSpec(ch_axis=0)", "Uint4PerChannelSpec(ch_axis=0, symmetric=True)", "FP8E5M3PerTensorSpec()"):
    assert found[name][1] == 0 and found[name][0] > 0.4, f"{name} keeps signs now"
assert found["Uint8PerChannelSpec(ch_axis=0, symmetric=False)"][0] < 0.0001 > found["Int8PerChannelSpec(ch_axis=0)"][0]
assert found["Uint4PerChannelSpec(ch_axis=0)"][0] < 0.02
assert "symmetric=True" in Uint4PerChannelSpec.__doc__
PY
sed -n 's/^FOUND //p' "$work/said"
