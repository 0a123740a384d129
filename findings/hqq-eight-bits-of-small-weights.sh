#!/usr/bin/env bash
# hqq 0.2.8.post1: of small weights 8 bits keep no more than 4 do, and of smaller ones nothing is left.
#
# A group's step is its range divided by the largest code, but never less than 1 / 20,000 (`scale.clamp(max=2e4)`), and
# where the range is below 0.0001 it is 1, so that all of the group becomes one number. For 4 bits the first bound is
# met at a range of 0.00075, for 8 bits at 0.0128 already: Gaussian weights in groups of 64 have that range at a
# deviation of 0.0027. At 0.001 8 bits have 7 times the error that they should have, at 0.0001 they have that of 4
# bits in twice the bytes, and at 0.00001 every width loses 98 percent of the energy, though `compute_dtype` is
# float32. Plain rounding loses the same at every size. Nothing is said. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install transformers==5.23.0 accelerate==1.15.0 einops termcolor
pip install --no-deps hqq==0.2.8.post1
"$work/venv/bin/python" - 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
from importlib.metadata import version

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

GROUP, WIDTHS = 64, (8, 4, 2)


def loss(found, weight):
    return float((found - weight).square().sum() / weight.square().sum())


def rounded(weight, bits):
    """Plain rounding between the smallest and the largest weight of a group."""
    groups = weight.reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((groups - low) / step).round() * step + low).reshape(weight.shape)


def read(weight, bits):
    layer = torch.nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight.data = weight.clone()
    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP)
    return HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu").dequantize()


torch.manual_seed(0)
weights = torch.randn(128, 1024)
losses = {}
print(f"hqq {version('hqq')}: squared error of Gaussian weights, relative, of hqq and of plain rounding")
for deviation in (1, 0.02, 0.001, 0.0001, 0.00001):
    for bits in WIDTHS:
        scaled = weights * deviation
        losses[deviation, bits] = loss(read(scaled, bits), scaled), loss(rounded(scaled, bits), scaled)
    shown = "; ".join(f"{bits} bits {one:.5f} {other:.5f}" for bits in WIDTHS for one, other in [losses[deviation, bits]])
    print(f"  deviation {deviation:<7}: {shown}")
for bits in WIDTHS:
    found, plain = losses[0.02, bits]
    assert 0.5 * plain < found < 1.5 * plain, "hqq is otherwise for usual weights, too"
    assert abs(losses[0.00001, bits][1] / plain - 1) < 0.01
    assert losses[0.00001, bits][0] > 0.9, "the smallest weights are kept now"
assert losses[0.001, 8][0] > 5 * losses[0.02, 8][0], "8 bits are 8 bits at 0.001 now"
assert 0.9 < losses[0.0001, 8][0] / losses[0.0001, 4][0] < 1.1, "8 bits are better than 4 at 0.0001 now"
PY
