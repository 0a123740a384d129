#!/usr/bin/env bash
# torch 2.13.0, ml_dtypes 0.6.0 and onnxruntime 1.32.0 cast what FP8 cannot hold in three ways.
#
# Beyond 448 float8_e4m3fn is 448 in torch (on the CPU) and in onnxruntime, NaN in ml_dtypes, which jax,
# too, is built on. torch saturates infinity as well: an overflow that happened before the cast is a plain
# 448 behind it, and `isfinite` finds nothing. Its float8_e5m2 does the opposite, 65,000 is infinity there
# as in ml_dtypes, while onnxruntime holds it at 57,344. float8_e8m0fnu, the scales of MX formats, has
# neither zero nor sign: torch and onnxruntime store 2^-127 for zero, ml_dtypes NaN; of -500 torch keeps
# 512, onnxruntime makes 2^-127, ml_dtypes NaN. None of it is said. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install onnxruntime==1.32.0 onnx==1.23.2 ml_dtypes==0.6.0
"$work/venv/bin/python" - 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
import ml_dtypes
import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper


def by_torch(x: np.ndarray, name: str) -> list[float]:
    return torch.tensor(x).to(getattr(torch, name)).float().tolist()


def by_ml_dtypes(x: np.ndarray, name: str) -> list[float]:
    return x.astype(getattr(ml_dtypes, name)).astype(np.float32).tolist()


def by_onnxruntime(x: np.ndarray, name: str) -> list[float]:
    kind = getattr(TensorProto, name.upper().replace("_", "").replace("E8M0FNU", "E8M0"))
    nodes = [helper.make_node("Cast", ["x"], ["small"], to=kind), helper.make_node("Cast", ["small"], ["y"], to=1)]
    ends = [helper.make_tensor_value_info(one, TensorProto.FLOAT, [len(x)]) for one in ("x", "y")]
    graph = helper.make_graph(nodes, "cast", [ends[0]], [ends[1]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0].tolist()


nan, inf, least = float("nan"), float("inf"), 2.0**-127
ways = (by_torch, by_ml_dtypes, by_onnxruntime)
print(f"torch {torch.__version__}, ml_dtypes {ml_dtypes.__version__}, onnxruntime {onnxruntime.__version__}")
for name, values, expected in (
    ("float8_e4m3fn", [464, 500, inf], ([448, 448, 448], [448, nan, nan], [448, 448, 448])),
    ("float8_e5m2", [57344, 65000, inf], ([57344, inf, inf], [57344, inf, inf], [57344, 57344, 57344])),
    ("float8_e8m0fnu", [500, 0, -500], ([512, least, 512], [512, nan, nan], [512, least, least])),
):
    found = [way(np.array(values, np.float32), name) for way in ways]
    print(f"{name:14} {values}: torch {found[0]}, ml_dtypes {found[1]}, onnxruntime {found[2]}")
    for way, one, right in zip(ways, found, expected):
        assert np.array_equal(one, right, equal_nan=True), f"{way.__name__} casts otherwise now"
PY
