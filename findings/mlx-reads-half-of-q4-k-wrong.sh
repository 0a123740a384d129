#!/usr/bin/env bash
# MLX 0.32.4: `mx.load` of a GGUF file reads half of every Q4_K tensor wrong, and leaves MXFP4 tensors out.
#
# A block of Q4_K has 256 weights in eight parts of 32, each with its own scale and minimum. MLX takes for
# every second part those of the part before: the bytes are right, the values are not. On Gaussian weights
# that ggml has quantized the error is 0.41 of their norm, where Q4_K itself costs 0.07; Q4_0, Q6_K and Q2_K
# are read right. Q4_K_M is what most GGUF files hold. A tensor of MXFP4 (the experts of gpt-oss) is simply
# not among what `mx.load` returns. Neither is said. The reader of values is gguf-tools', which MLX ships;
# the gguf package decodes the same bytes as ggml does. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install "mlx[cpu]==0.32.4" gguf==0.19.0
pip install --no-deps pywhispercpp==1.5.1
cat > "$work/write.py" <<'PY'
"""Writes files of one tensor, quantized by the libggml of whisper.cpp's wheel."""
import ctypes
import sys
import sysconfig
from pathlib import Path

import gguf
import numpy as np

ggml = ctypes.CDLL(str(Path(sysconfig.get_path("platlib"), "libggml-base.so.0")))
ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *2 * [ctypes.c_void_p], *3 * [ctypes.c_int64], ctypes.c_void_p]
weight = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
np.save(f"{sys.argv[1]}/weight.npy", weight)
for name in ("Q4_0", "Q2_K", "Q6_K", "Q4_K", "MXFP4"):
    kind = gguf.GGMLQuantizationType[name]
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.zeros((64, 1024 // size * stored), np.uint8)
    ggml.ggml_quantize_chunk(int(kind), weight.ctypes.data, blocks.ctypes.data, 0, 64, 1024, None)
    np.save(f"{sys.argv[1]}/{name}.npy", gguf.dequantize(blocks, kind))
    writer = gguf.GGUFWriter(f"{sys.argv[1]}/{name}.gguf", "llama")
    writer.add_tensor("other.weight", np.ones(4, np.float32))
    writer.add_tensor("layer.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
PY
"$work/venv/bin/python" "$work/write.py" "$work"
"$work/venv/bin/python" - "$work" <<'PY'
import sys
from importlib.metadata import version

import mlx.core as mx
import numpy as np

folder = sys.argv[1]
weight = np.load(f"{folder}/weight.npy")


def error(found, right):
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


print(f"mlx {version('mlx')}, gguf {version('gguf')}")
for name in ("Q4_0", "Q2_K", "Q6_K", "Q4_K"):
    stored = mx.load(f"{folder}/{name}.gguf")
    read = stored["layer.weight"]
    if "layer.scales" in stored:
        read = mx.dequantize(read, stored["layer.scales"], stored["layer.biases"], group_size=32, bits=4)
    read, right = np.array(read.astype(mx.float32)), np.load(f"{folder}/{name}.npy")
    wrong = (np.abs(read - right) > 0.01).reshape(-1, 8, 32).mean((0, 2)).round(2)
    print(f"{name}: quantization costs {error(right, weight):.3f}, MLX's reading {error(read, right):.4f};",
          f"share of wrong weights by part of 32: {wrong.tolist()}")
    if name == "Q4_K":
        assert (wrong[1::2] > 0.9).all() and (wrong[::2] == 0).all(), "MLX reads Q4_K right now"
        assert error(read, right) > 0.3
    else:
        assert error(read, right) < 0.001
names = sorted(mx.load(f"{folder}/MXFP4.gguf"))
print(f"MXFP4: the file holds layer.weight and other.weight, MLX returns {names}")
assert names == ["other.weight"], "MXFP4 is read, or refused, now"
PY
