#!/usr/bin/env bash
# onnxruntime 1.32.0 on a CPU: a model with quantized weights alone gets its activations rounded, too.
#
# The graph says DequantizeLinear of a constant in blocks, then MatMul in float32: ONNX's own way to write
# weights of 4 or 8 bits. At the default level of optimization both become one MatMulNBits with
# accuracy_level 4, which rounds the MatMul's other input to int8 in the same blocks, unasked and without a
# word. For weights of 8 bits that costs as much as the weights' own rounding; where one input of a block is
# 1000 times the others (language models have such ones), its neighbours are rounded to nothing. With
# graph_optimization_level BASIC, or session option "session.qdq_matmulnbits_accuracy_level" of "1", the graph
# gives what it says, to float32's precision. An error measured on one level says nothing of another.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install \
    onnxruntime==1.32.0 onnx==1.23.2 ml_dtypes==0.6.0 numpy
"$work/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

K, N, BLOCK = 1024, 256, 32
random = np.random.default_rng(0)
weight = random.normal(size=(K, N)).astype(np.float32)
plain = random.normal(size=(16, K)).astype(np.float32)
outlier = plain.copy()
outlier[:, ::BLOCK] *= 1000
blocks = weight.reshape(K // BLOCK, BLOCK, N)
ADDRESS = "session.qdq_matmulnbits_accuracy_level"


def model(bits: int) -> tuple[bytes, np.ndarray]:
    """A graph of standard operators with weights of so many bits, and these weights in float64."""
    limit = 2 ** (bits - 1) - 1
    scale = np.abs(blocks).max(1) / limit
    codes = np.round(blocks / scale[:, None]).clip(-limit, limit)
    stored = codes.reshape(K, N).astype(ml_dtypes.int4 if bits == 4 else np.int8)
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["codes", "scale"], ["weight"], axis=0, block_size=BLOCK),
            helper.make_node("MatMul", ["x", "weight"], ["y"]),
        ],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", N])],
        [numpy_helper.from_array(stored, "codes"), numpy_helper.from_array(scale, "scale")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return made.SerializeToString(), (codes * scale[:, None].astype(np.float64)).reshape(K, N)


def run(graph: bytes, x: np.ndarray, level: str = "", basic: bool = False) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if level:
        options.add_session_config_entry(ADDRESS, level)
    if basic:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def error(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


print(f"onnxruntime {onnxruntime.__version__}, relative error of outputs against the graph in float64")
for bits in (4, 8):
    graph, stored = model(bits)
    small = outlier.copy()
    small[:, ::BLOCK] = 0
    neighbours = run(graph, outlier) - (outlier - small).astype(np.float64) @ stored
    found = {
        "default": error(run(graph, plain), plain @ stored),
        "BASIC": error(run(graph, plain, basic=True), plain @ stored),
        "level 1": error(run(graph, plain, level="1"), plain @ stored),
        "of the weights' rounding": error(plain @ stored, plain @ weight.astype(np.float64)),
        "beside outliers, of what the others give": error(neighbours, small @ stored),
        "the same at level 1": error(
            run(graph, outlier, level="1") - (outlier - small).astype(np.float64) @ stored, small @ stored
        ),
    }
    print(f"weights of {bits} bits:", {name: float(f"{value:.2g}") for name, value in found.items()})
    assert found["default"] > 2e-3 and found["BASIC"] < 1e-5 and found["level 1"] < 1e-5, "activations stay now"
    assert found["beside outliers, of what the others give"] > 0.5 > 0.05 > found["the same at level 1"]
    assert bits == 4 or found["default"] > 0.5 * found["of the weights' rounding"]
PY
