#!/usr/bin/env bash
# MNN 3.6.1: `mnnconvert --weightQuantAsymmetric`, which is to make quantized weights better, makes them symmetric.
#
# `--help` says that weights are quantized symmetrically unless the flag asks for zero points, "to improve accuracy". By
# now zero points are the default (config.hpp), and the flag, alone or with `=true`, takes them away: its value is the
# text "true", which the parser (cxxopts.hpp, `parse_value` for bool) reads as a number, so it comes out as false. Only
# `=1` means yes. At 4 bits who asks for the better way gets a third more squared error than who does not ask, and half
# more in blocks of 32. `--keepInputFormat`, true by default as well, loses the input's layout in the same way.
# Nothing is said. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install MNN==3.6.1 onnx==1.23.2 numpy
"$work/venv/bin/python" - "$work" >"$work/found" 2>"$work/said" <<'PY' || { cat "$work/found" "$work/said"; exit 1; }
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import MNN
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

work = Path(sys.argv[1])
ROWS, COLUMNS, TOKENS = 128, 256, 64
rng = np.random.default_rng(0)
weight = (0.05 * rng.normal(size=(ROWS, COLUMNS))).astype(np.float32)
x = rng.normal(size=(TOKENS, COLUMNS)).astype(np.float32)
inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [TOKENS, ROWS])]
layer = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
graph = helper.make_graph([layer], "layer", inputs, outputs, [numpy_helper.from_array(weight, "w")])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), work / "layer.onnx")


def converter(*arguments: str) -> str:
    command = [f"{Path(sys.executable).parent}/mnnconvert", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def error(read: np.ndarray) -> float:
    true = x.astype(np.float64) @ weight.T
    return round(float(((read - true) ** 2).sum() / (true**2).sum()), 5)


def by_mnn(bits: int, block: int, *flags: str) -> float:
    """The squared error of the converted layer's outputs, of their energy; blocks of a whole row where `block` is 0."""
    made = work / "layer.mnn"
    blocks = [f"--weightQuantBlock={block}"] if block else []
    asked = [f"--weightQuantBits={bits}", *blocks, *flags]
    converter("-f", "ONNX", "--modelFile", f"{work}/layer.onnx", "--MNNModel", str(made), "--bizCode", "layer", *asked)
    runtime = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": 1},))
    net = MNN.nn.load_module_from_file(str(made), ["x"], ["y"], runtime_manager=runtime)
    answer = net.forward(MNN.expr.const(x, list(x.shape), MNN.expr.NCHW))
    made.unlink()
    return error(np.array(answer.read()).reshape(TOKENS, ROWS))


def by_hand(bits: int, block: int, symmetric: bool) -> float:
    groups = weight.astype(np.float64).reshape(ROWS, -1, block or COLUMNS)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    if symmetric:
        scale = np.abs(groups).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
        read = (groups / scale).round() * scale
    else:
        scale = (high - low) / (2**bits - 1)
        read = ((groups - low) / scale).round() * scale + low
    return error(x @ read.reshape(ROWS, COLUMNS).T)


def layout(*flags: str) -> str:
    """That of the input of a convolution of [1, 3, 8, 8], as the converter says it of the file."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xy")
    kernel = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "layer", [x], [y], [kernel])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), work / "conv.onnx")
    converter("-f", "ONNX", "--modelFile", f"{work}/conv.onnx", "--MNNModel", f"{work}/conv.mnn", "--bizCode", "layer", *flags)
    said = converter("-f", "MNN", "--modelFile", f"{work}/conv.mnn", "--info")
    return said.split("[ x ]: dimensionFormat: ")[1].split(",")[0]


FLAG = "--weightQuantAsymmetric"
said = " ".join(converter("--help").split())
assert "the default weight-quant uses SYMMETRIC quant method" in said and "default: false" in said.split(FLAG, 2)[-1][:500]
print("FOUND MNN", version("MNN"), "squared error of the outputs")
for bits, block in ((4, 0), (4, 32)):
    found = {flag: by_mnn(bits, block, *flag.split()) for flag in ("", FLAG, f"{FLAG}=true", f"{FLAG}=1", f"{FLAG}=0")}
    hand = {kind: by_hand(bits, block, kind == "symmetric") for kind in ("symmetric", "zero points")}
    print(f"FOUND {bits} bits, blocks of {block or 'a row'}: {found}, by hand {hand}")
    for flag in (FLAG, f"{FLAG}=true", f"{FLAG}=0"):
        assert abs(found[flag] / hand["symmetric"] - 1) < 0.03, f"{flag} asks for zero points now"
    for flag in ("", f"{FLAG}=1"):
        assert abs(found[flag] / hand["zero points"] - 1) < 0.03
    assert found[FLAG] > 1.25 * found[""]
kept = {flag: layout(*flag.split()) for flag in ("", "--keepInputFormat", "--keepInputFormat=1")}
print("FOUND layout of an input in NCHW:", kept)
assert kept == {"": "NCHW", "--keepInputFormat": "NC4HW4", "--keepInputFormat=1": "NCHW"}, "--keepInputFormat keeps it now"
PY
sed -n 's/^FOUND //p' "$work/found"
