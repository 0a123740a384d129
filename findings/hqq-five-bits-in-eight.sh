#!/usr/bin/env bash
# hqq 0.2.8: 5 and 6 bits take the bytes of 8, 1.58 bits those of 2, and 3 bits between 3.2 and 3.5.
#
# `nbits` chooses a grid, not a size. Values of 5 and 6 bits are kept in a byte each, so a "5-bit" layer is
# as large as an 8-bit one and has some 60 times its error. Three-bit values lie ten to an int32, after the
# number of groups has been filled up to a multiple of ten: 3.5 bits for a layer of 64 x 64. Scales and
# zero points (half a bit a weight in groups of 64) come on top. Comparing by `nbits` is not comparing at
# equal size. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install --no-deps hqq==0.2.8 tqdm einops accelerate transformers huggingface_hub packaging pyyaml requests termcolor safetensors psutil
"$work/venv/bin/python" - <<'PY'
from importlib.metadata import version

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

torch.manual_seed(0)


def stored(bits: float, size: int) -> tuple[float, float]:
    """Bits a weight in memory without scales and zero points, and the relative squared error."""
    linear = torch.nn.Linear(size, size, bias=False)
    weight = linear.weight.data.normal_().clone()
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    made = HQQLinear(linear, quant_config=config, compute_dtype=torch.float32, device="cpu")
    error = ((made.dequantize() - weight) ** 2).mean() / (weight**2).mean()
    return round(8 * made.W_q.numel() * made.W_q.element_size() / weight.numel(), 2), error.item()


print(f"hqq {version('hqq')}, groups of 64: nbits: (bits stored a weight, relative squared error)")
found = {bits: stored(bits, 1024) for bits in (8, 6, 5, 4, 3, 2, 1.58)}
print({bits: (size, float(f"{error:.2g}")) for bits, (size, error) in found.items()})
small = stored(3, 64)[0]
print(f"3 bits, 64 x 64: {small}")
assert found[5][0] == found[6][0] == found[8][0] == 8, "5 and 6 bits are packed now"
assert found[1.58][0] == found[2][0] == 2
assert found[3][0] > 3.19 and small == 3.5, "3 bits are packed otherwise now"
assert found[5][1] > 40 * found[8][1]
PY
