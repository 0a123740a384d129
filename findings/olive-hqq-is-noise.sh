#!/usr/bin/env bash
# Olive 0.13.0: its pass `OnnxHqqQuantization` writes layers that have nothing in common with their weights.
#
# MatMulNBits wants the codes of one output after the other, in blocks of neighbouring inputs. onnxruntime's HQQ, from
# which the pass comes, turns the weight [K, N] round before it rounds it and takes groups along axis 1. The pass does
# not turn it and takes axis 0 by default: its groups are K / block_size rows apart, its codes lie input by input, and
# it calls them [N, blocks, bytes] all the same. Read as the pass has laid them out the bytes are good HQQ; as the
# operator reads them, the error has more than twice the energy of the weights, as if two unrelated matrices had been
# subtracted, for every shape, block size and `axis`. The model loads and runs. onnxruntime's
# HQQWeightOnlyQuantConfig, and Olive's RTN, are right. Nothing is said. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install olive-ai==0.13.0 requests onnxruntime==1.32.0 onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 transformers==5.24.0
OLIVE_DISABLE_TELEMETRY=1 "$work/venv/bin/python" - "$work" >"$work/found" 2>"$work/said" <<'PY' || { cat "$work/found" "$work/said"; exit 1; }
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.hqq_quantization import OnnxHqqQuantization
from olive.passes.onnx.rtn_quantization import OnnxBlockWiseRtnQuantization
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, MatMulNBitsQuantizer

work = Path(sys.argv[1])
rng = np.random.default_rng(0)


def layer_of(weight: np.ndarray) -> onnx.ModelProto:
    inputs, outputs = weight.shape
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", inputs])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", outputs])
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")
    graph = helper.make_graph([node], "layer", [x], [y], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def error(read: np.ndarray, weight: np.ndarray) -> float:
    return float(((read.astype(np.float64) - weight) ** 2).sum() / (weight.astype(np.float64) ** 2).sum())


def by_runtime(model: onnx.ModelProto, weight: np.ndarray) -> float:
    """The squared error of the weights that the runtime computes with, of their energy."""
    assert [node.op_type for node in model.graph.node] == ["MatMulNBits"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return error(session.run(None, {"x": np.eye(len(weight), dtype=np.float32)})[0], weight)


def by_olive(kind: type, weight: np.ndarray, **settings: int) -> onnx.ModelProto:
    onnx.save(layer_of(weight), work / "layer.onnx")
    one = create_pass_from_dict(kind, settings, disable_search=True)
    return onnx.load(one.run(ONNXModelHandler(work / "layer.onnx"), work / "made").model_path)


def by_onnxruntime(weight: np.ndarray, block: int) -> onnx.ModelProto:
    made = MatMulNBitsQuantizer(layer_of(weight), algo_config=HQQWeightOnlyQuantConfig(block_size=block))
    made.process()
    return made.model.model


def as_laid_out(model: onnx.ModelProto, weight: np.ndarray, block: int) -> float:
    """The error of the same bytes, read as [K, N / 2] with groups of rows that lie K / block apart."""
    found = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    packed, scales, zeros = (found[f"w_{name}"].reshape(-1) for name in ("Q4", "scales", "zero_points"))
    codes = np.stack((packed & 15, packed >> 4), -1).reshape(block, -1).astype(np.float64)
    return error(((codes - zeros) * scales).reshape(weight.shape), weight)


print("FOUND", {name: version(name) for name in ("olive-ai", "onnxruntime")}, "4 bits, squared error of the weights")
for shape, block in (((128, 128), 128), ((256, 128), 128), ((128, 256), 32), ((512, 512), 64)):
    weight = (0.05 * rng.normal(size=shape)).astype(np.float32)
    model = by_olive(OnnxHqqQuantization, weight, block_size=block)
    found = {
        "Olive's HQQ": by_runtime(model, weight),
        "along axis 1": by_runtime(by_olive(OnnxHqqQuantization, weight, block_size=block, axis=1), weight),
        "its bytes as they are laid out": as_laid_out(model, weight, block),
        "onnxruntime's HQQ": by_runtime(by_onnxruntime(weight, block), weight),
        "Olive's RTN": by_runtime(by_olive(OnnxBlockWiseRtnQuantization, weight, block_size=block), weight),
    }
    print(f"FOUND {shape} in blocks of {block}:", ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    noise, along, *good = found.values()
    assert noise > 1.5 and along > 1.5, "Olive's HQQ says what the weights say now"
    assert max(good) < 0.02
PY
sed -n 's/^FOUND //p' "$work/found"
