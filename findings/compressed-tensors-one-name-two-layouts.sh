#!/usr/bin/env bash
# compressed-tensors 0.17.1 and 0.20.0 lay weights of 3, 5, 6 and 7 bits out differently under one and the same name,
# and 0.20.0 reads what 0.17.1 wrote as noise, without a word.
#
# Both call the format "pack-quantized". 0.17.1 puts as many whole codes into a word of 32 bits as fit, ten of 3
# bits; 0.20.0 (from 0.18.0 on) puts them end to end, and lets one lie in two words. Names, types, scales and
# `weight_shape` are the same, nothing in them tells which layout it is, and the reader does not count words: of
# 256 columns the older file has 26 a row where 24 are expected, and the last two are left alone. Five of six codes
# of 3 bits come out wrong, nearly all of the others, and a layer's error has three times the energy of its weights.
# What had been quantized before is spoilt by an upgrade of the reader. The other way round 0.17.1 returns a matrix
# of 240 or 224 columns, whatever `weight_shape` says. Widths of 4 and 8 are read right. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install transformers==5.23.0 accelerate==1.15.0 pydantic loguru
pip install --no-deps --target "$work/0.17.1" compressed-tensors==0.17.1
pip install --no-deps --target "$work/0.20.0" compressed-tensors==0.20.0
cat > "$work/both.py" <<'PY'
"""both.py write|read FOLDER: makes files with the release on the path, or reads them back."""
import sys
from importlib.metadata import version

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

release = version("compressed-tensors")
task, folder, writer = sys.argv[1:]
torch.manual_seed(0)
weight = 0.02 * torch.randn(64, 256)
for bits in (3, 4, 5, 6, 7, 8):
    weights = QuantizationArgs(num_bits=bits, strategy="group", group_size=64, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    scale = weight.reshape(64, 4, 64).abs().amax(-1) / (2 ** (bits - 1) - 0.5)
    path = f"{folder}/{writer}-{bits}.safetensors"
    if task == "write":
        stored = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        save_file({name: value for name, value in stored.items() if value is not None}, path)
        continue
    stored = load_file(path)
    words = stored["weight_packed"].shape[1]
    kinds = ", ".join(f"{name} {value.dtype}".replace("torch.", "") for name, value in sorted(stored.items()))
    found = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    if found.shape != weight.shape:
        print(f"{release} reads {writer}, {bits} bits ({words} words a row): a matrix of {tuple(found.shape)}")
        assert bits not in (4, 8) and (release, writer) == ("0.17.1", "0.20.0") and found.shape[1] < weight.shape[1]
        continue
    steps = scale.repeat_interleave(64, 1)
    codes = ((found - weight).abs() > 0.51 * steps).float().mean()
    loss = float((found - weight).square().sum() / weight.square().sum())
    print(f"{release} reads {writer}, {bits} bits ({words} words a row; {kinds}): {codes:.0%} of the codes wrong, "
          f"squared error {loss:.4f}")
    if writer == release or bits in (4, 8):
        assert codes < 0.001 and loss < 0.1
    else:
        assert release == "0.20.0" and codes > 0.7 and loss > 1, "the older layout is told apart now"
PY
for writer in 0.17.1 0.20.0; do
    PYTHONPATH="$work/$writer" "$work/venv/bin/python" "$work/both.py" write "$work" $writer 2>"$work/said" || { cat "$work/said"; exit 1; }
done
for reader in 0.17.1 0.20.0; do
    for writer in 0.17.1 0.20.0; do
        PYTHONPATH="$work/$reader" "$work/venv/bin/python" "$work/both.py" read "$work" $writer 2>"$work/said" || { cat "$work/said"; exit 1; }
        [ ! -s "$work/said" ] || { echo "something is said now:"; cat "$work/said"; exit 1; }
    done
done
