#!/usr/bin/env bash
# ai-edge-quantizer 0.10.0: asked for weights alone, its rotations and "OSCAR" write a model that rounds activations.
#
# `add_weight_only_config` promises that the layer computes in float. With the default algorithm the file has a
# DEQUANTIZE in front of the layer, and so it does. With HADAMARD_ROTATION, DECOMPOSED_HADAMARD_ROTATION and OSCAR the
# file is byte for byte the one that `add_dynamic_config` gives: int8 weights go into the layer itself, and the runtime
# rounds its inputs to int8, one scale a token. Where one input is 1000 times the others (language models have such
# ones), OSCAR's neighbours of it lose most of what they say, where the default loses nothing. A quality measured for
# "weight-only" is that of dynamic quantization. Nothing is said. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install ai-edge-quantizer==0.10.0 ai-edge-litert==2.3.0 numpy
"$work/venv/bin/python" - 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
import contextlib
import io
from importlib.metadata import version

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as tflite
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import qtyping
from ai_edge_quantizer.algorithm_manager import AlgorithmName
from ai_edge_quantizer.quantizer import Quantizer

ROWS, COLUMNS = 64, 256
rng = np.random.default_rng(0)


def made(kind: type, **fields: object) -> object:
    one = kind()
    for name, value in fields.items():
        setattr(one, name, value)
    return one


def model(weight: np.ndarray) -> bytearray:
    """One fully connected layer, y = x @ weight.T, as a .tflite file; weight [ROWS, COLUMNS], float32."""

    def tensor(name: bytes, shape: tuple[int, int], buffer: int) -> object:
        return made(tflite.TensorT, name=name, shape=np.array(shape, np.int32), type=tflite.TensorType.FLOAT32, buffer=buffer)

    def ends(*pairs: tuple[bytes, int]) -> list[object]:
        return [made(tflite.TensorMapT, name=name, tensorIndex=index) for name, index in pairs]

    layer = made(
        tflite.OperatorT,
        opcodeIndex=0,
        inputs=np.array([0, 1, -1], np.int32),
        outputs=np.array([2], np.int32),
        builtinOptionsType=tflite.BuiltinOptions.FullyConnectedOptions,
        builtinOptions=tflite.FullyConnectedOptionsT(),
    )
    graph = made(
        tflite.SubGraphT,
        tensors=[tensor(b"x", (COLUMNS, COLUMNS), 0), tensor(b"w", (ROWS, COLUMNS), 1), tensor(b"y", (COLUMNS, ROWS), 0)],
        inputs=np.array([0], np.int32),
        outputs=np.array([2], np.int32),
        operators=[layer],
        name=b"main",
    )
    code = tflite.BuiltinOperator.FULLY_CONNECTED
    whole = made(
        tflite.ModelT,
        version=3,
        operatorCodes=[made(tflite.OperatorCodeT, builtinCode=code, deprecatedBuiltinCode=code, version=1)],
        subgraphs=[graph],
        buffers=[tflite.BufferT(), made(tflite.BufferT, data=np.frombuffer(weight.tobytes(), np.uint8))],
        signatureDefs=[
            made(tflite.SignatureDefT, signatureKey=b"serve", inputs=ends((b"x", 0)), outputs=ends((b"y", 2)), subgraphIndex=0)
        ],
    )
    builder = flatbuffers.Builder()
    builder.Finish(whole.Pack(builder), b"TFL3")
    return bytearray(builder.Output())


def answers(file: bytes, x: np.ndarray) -> np.ndarray:
    runtime = Interpreter(model_content=bytes(file))
    runtime.allocate_tensors()
    runtime.set_tensor(runtime.get_input_details()[0]["index"], x)
    runtime.invoke()
    return runtime.get_tensor(runtime.get_output_details()[0]["index"])


def quantized(algorithm: AlgorithmName, weights_alone: bool) -> bytes:
    quantizer = Quantizer(model(weight))
    ask = quantizer.add_weight_only_config if weights_alone else quantizer.add_dynamic_config
    ask(".*", qtyping.TFLOperationName.FULLY_CONNECTED, 8, qtyping.QuantGranularity.CHANNELWISE, algorithm)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints sizes
        return bytes(quantizer.quantize().quantized_model)


def operators(file: bytes) -> list[str]:
    names = {number: name for name, number in vars(tflite.BuiltinOperator).items() if isinstance(number, int)}
    read = tflite.ModelT.InitFromPackedBuf(file, 0)
    return [names[read.operatorCodes[layer.opcodeIndex].builtinCode] for layer in read.subgraphs[0].operators]


print("ai-edge-quantizer", version("ai-edge-quantizer"), "8 bits: what the inputs beside one that is 1000 times as large say")
weight = (0.05 * rng.normal(size=(ROWS, COLUMNS))).astype(np.float32)
large = np.zeros((COLUMNS, COLUMNS), np.float32)
large[:, 0] = 1000
others = rng.normal(size=(COLUMNS, COLUMNS)).astype(np.float32)
others[:, 0] = 0
true = others.astype(np.float64) @ weight.T
for algorithm in (
    AlgorithmName.MIN_MAX_UNIFORM_QUANT,
    AlgorithmName.OSCAR,
    AlgorithmName.HADAMARD_ROTATION,
    AlgorithmName.DECOMPOSED_HADAMARD_ROTATION,
):
    asked, dynamic = quantized(algorithm, weights_alone=True), quantized(algorithm, weights_alone=False)
    heard = answers(asked, large + others).astype(np.float64) - answers(asked, large)
    lost = float(((heard - true) ** 2).sum() / (true**2).sum())
    same = asked == dynamic
    print(f"{algorithm.name}: {operators(asked)}, the file of dynamic quantization: {same}, squared error {lost:.2g}")
    if algorithm is AlgorithmName.MIN_MAX_UNIFORM_QUANT:
        assert "DEQUANTIZE" in operators(asked) and not same and lost < 0.001
    else:
        assert "DEQUANTIZE" not in operators(asked) and same, f"{algorithm.name} keeps activations now"
PY
