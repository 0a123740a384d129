#!/usr/bin/env bash
# peft 0.21.2: merging LoRA into a layer whose `weight` is computed loses the adapter without a word.
#
# Layers that keep packed codes often offer `weight` as a property which is made anew at each access.
# peft's `merge` adds to `base_layer.weight.data`, so the sum goes into a tensor that nobody keeps;
# `merge_and_unload` then drops the adapter, and returns the layer as if nothing had been trained.
# Seen: no warning, no error, outputs as without the adapter. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install peft==0.21.2 transformers==5.23.0 accelerate
"$work/venv/bin/python" - <<'PY'
import warnings

import peft
import torch
from peft.tuners.lora.layer import Linear
from torch import nn


class Computed(nn.Module):
    """A linear whose weight is made from what it stores."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("codes", torch.randint(0, 4, (8, 8), dtype=torch.uint8))

    @property
    def weight(self) -> torch.Tensor:
        return self.codes.float() - 1.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = Computed(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x))


torch.manual_seed(0)
config = peft.LoraConfig(target_modules=["layer"], r=2)
config._register_custom_module({Computed: Linear})
model, x = Model(), torch.randn(3, 8)
plain = model(x)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "Unsupported layer type", when the adapter is put on
    adapted = peft.get_peft_model(model, config)
nn.init.normal_(adapted.base_model.model.layer.lora_B["default"].weight)
trained = adapted(x)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    merged = adapted.merge_and_unload()(x)
moved, kept = (trained - plain).abs().max().item(), (merged - plain).abs().max().item()
print(f"peft {peft.__version__}: the adapter moves outputs by {moved:.2f}, after the merge by {kept:.2f}")
assert moved > 0.1 and kept == 0.0, "peft no longer loses the adapter"
PY
