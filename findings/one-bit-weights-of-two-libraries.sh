#!/usr/bin/env bash
# torchao 0.18.0 and hqq 0.2.8, both asked for one bit a weight, give weights that are worse than none.
#
# torchao's `IntxWeightOnlyConfig(weight_dtype=torch.int1)` (its default mapping, symmetric) has the codes
# -1 and 0 and a scale that lets the largest weight fall on half a step, which rounds to 0: every weight
# becomes 0, and so does every output, without a word. hqq's `nbits=1` keeps the smallest and the largest
# weight of a group of 64 as its two values: the error has more than twice the energy of the weights, where
# leaving the layer out costs once that energy, and one size for both signs 0.36 of it.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install --no-deps torchao==0.18.0
pip install --no-deps hqq==0.2.8 tqdm einops accelerate transformers huggingface_hub packaging pyyaml requests termcolor safetensors psutil
"$work/venv/bin/python" - 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
from importlib.metadata import version

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

torch.manual_seed(0)
weight = torch.randn(64, 1024)


def layer() -> torch.nn.Linear:
    made = torch.nn.Linear(1024, 64, bias=False)
    made.weight.data.copy_(weight)
    return made


def error(found: torch.Tensor) -> float:
    """Squared error over the squared weights."""
    return (((found - weight) ** 2).sum() / (weight**2).sum()).item()


by_torchao = torch.nn.Sequential(layer())
quantize_(by_torchao, IntxWeightOnlyConfig(weight_dtype=torch.int1, granularity=PerGroup(64)))
zeros = by_torchao[0].weight.dequantize().eq(0).all().item()
config = BaseQuantizeConfig(nbits=1, group_size=64, axis=1)
by_hqq = error(HQQLinear(layer(), quant_config=config, compute_dtype=torch.float32, device="cpu").dequantize())
groups = weight.view(64, -1, 64)
best = error((groups.sign() * groups.abs().mean(-1, keepdim=True)).view_as(weight))
print(f"torchao {version('torchao')}: all weights are 0: {zeros}")
print(f"hqq {version('hqq')}: relative squared error {by_hqq:.2f}; sign and mean size, for comparison, {best:.2f}")
assert zeros, "torchao's one bit is something now"
assert by_hqq > 2, "hqq's one bit is better than nothing now"
PY
