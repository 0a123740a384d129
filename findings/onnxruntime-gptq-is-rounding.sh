#!/usr/bin/env bash
# onnxruntime 1.32.0: `GPTQWeightOnlyQuantConfig` gives the codes of plain rounding, and with `actorder` or `mse`
# something worse.
#
# GPTQ hands each column's rounding error on to the columns that are not rounded yet, by a triangular factor of
# the inverse Hessian. `gptq` in quantization/neural_compressor/weight_only.py makes the upper factor, but takes
# the shares from below its diagonal: those are zeros, so nothing is handed on, whatever the calibration data.
# Codes and zero points are those of `RTNWeightOnlyQuantConfig`, scales too but for their last bits. GPTQ as it
# is meant takes away nine tenths of the error of inputs that hang together as those here do. `actorder` rounds
# in groups of reordered columns, and the result is rounded again in the stored ones; `mse` compares codes with
# weights where it looks for a scale. Both lose more than rounding. Nothing is said; onnx-neural-compressor 1.0
# has the same lines (read, not run). Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0
pip install onnxruntime==1.32.0 onnx==1.23.2 onnx_ir==1.1.0 ml_dtypes==0.6.0 numpy==2.4.6
"$work/venv/bin/python" - 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
import contextlib
import sys
from importlib.metadata import version

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization.matmul_nbits_quantizer import (
    GPTQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    RTNWeightOnlyQuantConfig,
)

COLUMNS, ROWS, GROUP = 256, 128, 32
random = np.random.default_rng(0)
mix = random.normal(size=(32, COLUMNS))


def inputs(tokens):
    """Inputs that hang together, as those of a layer do: 32 common causes and a little of their own."""
    return (random.normal(size=(tokens, 32)) @ mix + 0.3 * random.normal(size=(tokens, COLUMNS))).astype(np.float32)


seen, unseen = inputs(1024), inputs(1024)
weight = (0.05 * random.normal(size=(COLUMNS, ROWS))).astype(np.float32)


class Reader(CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"x": seen[start : start + 256]} for start in range(0, len(seen), 256)])

    def __deepcopy__(self, _):
        return Reader()

    def get_next(self):
        return next(self.batches, None)


def quantized(config):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", COLUMNS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", ROWS])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made = MatMulNBitsQuantizer(model, block_size=GROUP, is_symmetric=False, accuracy_level=1, algo_config=config)
    with contextlib.redirect_stdout(sys.stderr):
        made.process()
    model = made.model.model
    (node,) = model.graph.node
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    read = session.run(None, {"x": np.eye(COLUMNS, dtype=np.float32)})[0]
    return read, [stored[name] for name in node.input[1:]]


def meant():
    """GPTQ on the same grid, a column at a time, in float64."""
    left, product = weight.astype(np.float64), seen.T.astype(np.float64) @ seen
    product[np.diag_indices(COLUMNS)] += 0.01 * np.diag(product).mean()
    upper = np.linalg.cholesky(np.linalg.inv(product)).T
    made = np.zeros_like(left)
    for column in range(COLUMNS):
        if column % GROUP == 0:
            low, high = left[column : column + GROUP].min(0), left[column : column + GROUP].max(0)
            scale = (high - low) / 15
            zero = np.round(-low / scale)
        made[column] = scale * (np.clip(np.round(left[column] / scale + zero), 0, 15) - zero)
        error = (left[column] - made[column]) / upper[column, column]
        left[column + 1 :] -= np.outer(upper[column, column + 1 :], error)
    return made


def loss(read):
    right = unseen @ weight
    return float(((unseen @ read - right) ** 2).sum() / (right**2).sum())


print(f"onnxruntime {version('onnxruntime')}, 4 bits in groups of {GROUP}: squared error of the outputs")
rounded, parts = quantized(RTNWeightOnlyQuantConfig())
ways = {
    "GPTQ": quantized(GPTQWeightOnlyQuantConfig(Reader())),
    "GPTQ, actorder": quantized(GPTQWeightOnlyQuantConfig(Reader(), actorder=True)),
    "GPTQ, mse": quantized(GPTQWeightOnlyQuantConfig(Reader(), mse=True)),
}
losses = {"RTN": loss(rounded)} | {name: loss(read) for name, (read, _) in ways.items()}
losses["GPTQ as it is meant"] = loss(meant())
for name, value in losses.items():
    print(f"  {name}: {value:.5f}")
codes, scales, zeros = zip(parts, ways["GPTQ"][1], strict=True)
same = [bool(np.array_equal(*pair)) for pair in (codes, zeros)]
print(f"codes and zero points of GPTQ equal those of RTN: {same}; scales differ by", end=" ")
print(f"{np.abs(scales[1] / scales[0] - 1).max():.1e} of themselves at most")
assert all(same) and np.allclose(*scales, rtol=1e-6, atol=0), "GPTQ differs from rounding now"
assert losses["GPTQ as it is meant"] < 0.1 * losses["RTN"]
assert losses["GPTQ, actorder"] > 1.3 * losses["RTN"], "actorder is better now"
assert losses["GPTQ, mse"] > 1.3 * losses["RTN"], "mse is better now"
PY
