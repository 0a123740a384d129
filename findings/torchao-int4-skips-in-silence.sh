#!/usr/bin/env bash
# torchao 0.18.0: `Int4WeightOnlyConfig` leaves a layer as it is where its columns are no multiple of the
# group, and says so to a logger at level INFO alone.
#
# `quantize_` returns as if all had gone well: a model of 576 columns asked for 4 bits in groups of 128 has
# the weights, bytes and type that it had. The same request by `IntxWeightOnlyConfig` raises an error that
# names both numbers. So a size or a perplexity measured behind `Int4WeightOnlyConfig` may be that of the
# float model, or of half of it. Look at the types of the weights. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install --no-deps torchao==0.18.0
"$work/venv/bin/python" - 2>"$work/said" <<'PY'
import logging
from importlib.metadata import version

import torch
from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = said.append
logging.getLogger().addHandler(handler)


def model(columns):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(columns, 512, bias=False)).bfloat16()


print(f"torchao {version('torchao')}, 4 bits in groups of 128, a layer of 576 columns")
whole = model(576)
before = whole[0].weight.clone()
quantize_(whole, Int4WeightOnlyConfig(group_size=128))
after = whole[0].weight
print("Int4WeightOnlyConfig:", type(after.data).__name__, after.dtype, "warnings:", len(said))
assert type(after.data) is torch.Tensor and torch.equal(after, before), "it is quantized now"
assert not said, "it says so now"
try:
    quantize_(model(576), IntxWeightOnlyConfig(torch.int4, PerGroup(128)))
except AssertionError as error:
    print("IntxWeightOnlyConfig:", error)
else:
    raise SystemExit("IntxWeightOnlyConfig takes it now")
small = model(640)
quantize_(small, IntxWeightOnlyConfig(torch.int4, PerGroup(128)))
print("IntxWeightOnlyConfig, 640 columns:", type(small[0].weight.data).__name__)
assert type(small[0].weight.data) is not torch.Tensor
PY
