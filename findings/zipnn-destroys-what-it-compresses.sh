#!/usr/bin/env bash
# zipnn 0.5.4: compressing bfloat16 or float32 weights destroys the weights that were given, even in immutable bytes.
#
# ZipNN is a lossless compressor of models. `compress` turns the bits of each number in place, to bring exponents
# together, and never turns them back: what it returns decompresses to the right values, but the tensor that was
# handed over, a parameter of a live model for example, holds numbers of 1e30 and more from then on, and the next
# thing computed or saved from it is nonsense. `input_format="byte"` writes into the caller's `bytes` object, which
# Python holds to be immutable. Compressing the same tensor twice stores the nonsense, without a loss. float16 is
# left alone, and so are numpy arrays. Nothing is said, and no document says so. Give it a copy.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install zipnn==0.5.4
"$work/venv/bin/python" - 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
from importlib.metadata import version

import numpy as np
import torch
from zipnn import ZipNN

print(f"zipnn {version('zipnn')}, torch {torch.__version__}")
for name in ("bfloat16", "float32", "float16"):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False).to(getattr(torch, name))
    right = layer.weight.detach().clone()
    tool = ZipNN(input_format="torch", bytearray_dtype=name)
    packed = tool.compress(layer.weight.data)
    first = torch.equal(tool.decompress(packed), right)
    kept, largest = torch.equal(layer.weight, right), float(layer.weight.detach().float().abs().max())
    second = torch.equal(tool.decompress(tool.compress(layer.weight.data)), right)

    original = right.view(torch.uint8).numpy().tobytes()
    given = bytes(bytearray(original))
    tool = ZipNN(input_format="byte", bytearray_dtype=name)
    comes_back = bytes(tool.decompress(tool.compress(given))) == original
    print(f"{name:8} tensor: decompresses right {first}, source kept {kept} (largest {largest:.1e}), second time right "
          f"{second}; bytes: decompress right {comes_back}, source kept {given == original}")
    assert first and comes_back, "what is decompressed is not what was compressed"
    if name == "float16":
        assert kept and second and given == original
    else:
        assert not kept and not second and largest > 1e30 and given != original, "the source is kept now"

array = np.random.default_rng(0).normal(size=4096).astype(np.float32)
before = array.copy()
ZipNN(input_format="numpy", bytearray_dtype="float32").compress(array)
print(f"numpy array of float32: source kept {np.array_equal(array, before)}")
assert np.array_equal(array, before)
PY
