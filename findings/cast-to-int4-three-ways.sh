#!/usr/bin/env bash
# onnxruntime 1.32.0, ml_dtypes 0.6.0 and jax 0.10.2 cast one float to int4 in three ways.
#
# onnxruntime's Cast truncates to INT8 (0.75 is 0), but rounds to INT4 and UINT4 (0.75 is 1), with halves
# away from zero where QuantizeLinear goes to the even number, and wraps what it has rounded past the end:
# 7.5 is 7 as INT8 and -8 as INT4, -8.6 is 7. ONNX's reference evaluator and ml_dtypes truncate, then wrap:
# 7.5 is 7, 8 is -8, 100 is 4. jax truncates, then clamps: 8 and 100 are 7. jnp.int4 is ml_dtypes' type, so
# `np.asarray(x).astype(jnp.int4)` and `jnp.asarray(x).astype(jnp.int4)` differ in the sign of the largest
# weights. Nobody says a word. Rounded and clipped before the cast, all agree. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install \
    onnxruntime==1.32.0 onnx==1.23.2 ml_dtypes==0.6.0 jax==0.10.2 numpy
"$work/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

x = np.array([0.5, 0.75, 2.5, -0.75, 6.6, 7.5, -8.6, 8, 100], np.float32)


def graph(kind: int, before: tuple[str, ...] = ()) -> onnx.ModelProto:
    """Casts to an integer type and back to float32, after other operators."""
    names = ["x", *(f"after {one}" for one in before), "integers", "y"]
    nodes = [
        helper.make_node(one, [names[i], *(["low", "high"] if one == "Clip" else [])], [names[i + 1]])
        for i, one in enumerate(before)
    ]
    nodes.append(helper.make_node("Cast", [names[-3]], ["integers"], to=kind))
    nodes.append(helper.make_node("Cast", ["integers"], ["y"], to=TensorProto.FLOAT))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(x)]) for name in ("x", "y")]
    limits = [helper.make_tensor("low", 1, [], [-8.0]), helper.make_tensor("high", 1, [], [7.0])]
    made = helper.make_graph(nodes, "cast", [ends[0]], [ends[1]], limits if "Clip" in before else [])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def by_runtime(model: onnx.ModelProto) -> list[float]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0].tolist()


def by_reference(model: onnx.ModelProto) -> list[float]:
    return ReferenceEvaluator(model).run(None, {"x": x})[0].tolist()


def by_numpy(x: np.ndarray) -> list[float]:
    return x.astype(jnp.int4).astype(np.float32).tolist()


def by_jax(x: np.ndarray) -> list[float]:
    return jnp.asarray(x).astype(jnp.int4).astype(jnp.float32).tolist()


small, large = graph(TensorProto.INT4), graph(TensorProto.INT8)
safe = graph(TensorProto.INT4, ("Round", "Clip"))
wrapped = [0, 0, 2, 0, 6, 7, -8, -8, 4]
print("values                    ", x.round(2).tolist())
print(f"onnxruntime {onnxruntime.__version__} as INT8", by_runtime(large))
print(f"onnxruntime {onnxruntime.__version__} as INT4", by_runtime(small))
print(f"onnx {onnx.__version__} as INT4       ", by_reference(small))
print(f"ml_dtypes {ml_dtypes.__version__}           ", by_numpy(x))
print(f"jax {jax.__version__}                ", by_jax(x))
print("rounded and clipped before", by_runtime(safe))
assert by_runtime(large) == [0, 0, 2, 0, 6, 7, -8, 8, 100] == by_reference(large)
assert by_runtime(small) == [1, 1, 3, -1, 7, -8, 7, -8, 4], "onnxruntime casts otherwise now"
assert by_reference(small) == wrapped == by_numpy(x), "onnx or ml_dtypes casts otherwise now"
assert by_jax(x) == [0, 0, 2, 0, 6, 7, -8, 7, 7], "jax casts otherwise now"
limited = x.round().clip(-8, 7)
assert by_runtime(safe) == by_reference(safe) == by_numpy(limited) == by_jax(limited)
PY
