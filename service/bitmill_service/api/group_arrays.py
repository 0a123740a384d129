"""Groups of a whole model as typed arrays, for readers to whom JSON would be too slow.

The bytes are a safetensors file: a reader takes a view of each array and parses nothing but the
header. L linears of which linear i has the groups starts[i] to starts[i + 1], T groups in all:

    names    u8 [*]     the linears' names, a JSON list in UTF-8
    starts   i32 [L+1]  first group of every linear
    shapes   i32 [L, 2] output rows and input columns

What else there is, `job_groups` and `profile_maps` say. An array that is not known is absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from bitmill.allocation.allocator import Allocator, CurvePoint
from bitmill.allocation.groups import GroupWidths
from bitmill.allocation.profiled import ProfiledModel
from bitmill.config.bit_width_map import BitWidthMap, LinearShape, group_columns
from bitmill.formats.accounting import group_weight
from bitmill.io.safetensors import TensorInfo, header
from bitmill.plan.model_plan import Plan
from bitmill.reporting.summary import ProfileSummary
from bitmill.results import QualityReport

Arrays = dict[str, npt.NDArray[Any]]

MEDIA_TYPE = "application/octet-stream"
ARRAYS = {
    "description": "A safetensors file.",
    "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
}
"""OpenAPI of an answer in arrays."""

_DTYPES = {"|u1": "U8", "<i4": "I32", "<f4": "F32", "<f8": "F64"}


def job_groups(
    found: BitWidthMap,
    report: QualityReport | None,
    summary: ProfileSummary | None,
    plan: Plan | None,
) -> bytes:
    """A job's map, and what is known of its groups and linears.

    widths u8 [T]; outliers i32 [L]: columns in 16 bits, where some linear has any; bytes i32 [T]:
    stored bytes of each group; error f32 [L]: relative error of the refined linear on its inputs;
    sensitivity f32 [T]: predicted increase of the loss, nats per token, with this group at
    `reference_width` i32 [1]; predicted_loss f32 [L]: of the linear at the widths it has. NaN where
    one linear has none. Raises `FormatError` where the plan is of another model.
    """
    names = list(found.linears)
    arrays = _layout(names, [len(widths) for widths in found.linears.values()])
    arrays["widths"] = _joined(found.linears.values(), "|u1")
    if found.outliers:
        arrays["outliers"] = np.array([found.outliers.get(n, 0) for n in names], dtype="<i4")
    if plan is not None:
        found.check_shapes(plan.shapes)
        shapes = {shape.name: shape for shape in plan.shapes}
        arrays["shapes"] = _shapes([shapes[name] for name in names])
        weigh = cache(partial(group_weight, plan, "bits"))
        stored = (
            weigh(shapes[name].rows, columns, width)
            for name, widths in found.linears.items()
            for width, columns in zip(widths, group_columns(shapes[name].columns), strict=True)
        )
        arrays["bytes"] = np.fromiter(stored, dtype="<i4")
    if report is not None and report.linears:
        errors = {linear.name: linear.relative_error for linear in report.linears}
        arrays["error"] = np.array([errors.get(name, np.nan) for name in names], dtype="<f4")
    if summary is not None:
        known = summary.linears
        none = {name: [np.nan] * len(found.linears[name]) for name in names if name not in known}
        groups = (known[name].groups if name in known else none[name] for name in names)
        losses = [known[name].predicted_loss if name in known else np.nan for name in names]
        arrays["sensitivity"] = _joined(groups, "<f4")
        arrays["predicted_loss"] = np.array(losses, dtype="<f4")
        arrays["reference_width"] = np.array([summary.reference_width], dtype="<i4")
    return encode(arrays)


def profile_maps(model: ProfiledModel, points: int) -> bytes:
    """The curve of a profile with the map of every point, P <= `points` of them.

    widths u8 [P, T], the smallest map first; size, bits, code_bits, predicted_loss f64 [P].
    uniform_widths u8 [U], and uniform_size, uniform_bits, uniform_code_bits,
    uniform_predicted_loss f64 [U]: the same of maps with one width. legal u8 [B]: the widths that
    groups may have; costs f32 [T, B]: predicted increase of the loss, nats per token, of a group at
    each of them; bytes_at i32 [T, B]: what it takes.

    Raises `SpecError` for a profile without costs.
    """
    allocator = model.allocator({"method": "knapsack"})
    plan, legal = model.plan, allocator.groups.widths
    arrays = _layout([s.name for s in plan.shapes], [s.groups for s in plan.shapes])
    maps = allocator.maps(points)
    uniform = [allocator.groups.uniform(width) for width in legal.tolist()]
    arrays |= {f"uniform_{name}": array for name, array in _points(allocator, uniform).items()}
    return encode(
        arrays
        | {
            "shapes": _shapes(plan.shapes),
            "widths": np.stack(maps).astype(np.uint8),
            "legal": legal.astype(np.uint8),
            "costs": allocator.costs.astype("<f4"),
            "bytes_at": allocator.groups.weights("bits").astype("<i4"),
            "uniform_widths": legal.astype(np.uint8),
        }
        | _points(allocator, maps)
    )


def encode(arrays: Arrays) -> bytes:
    """The safetensors file of these arrays, each aligned to the bytes of its elements."""
    found = [TensorInfo(name, _DTYPES[a.dtype.str], a.shape) for name, a in arrays.items()]
    head, places = header(found)
    parts = sorted(arrays, key=lambda name: places[name])
    return b"".join([head, *(arrays[name].tobytes() for name in parts)])


def _layout(names: Sequence[str], groups: Sequence[int]) -> Arrays:
    text = json.dumps(list(names), ensure_ascii=False).encode()
    return {
        "names": np.frombuffer(text, dtype=np.uint8),
        "starts": np.cumsum([0, *groups]).astype("<i4"),
    }


def _shapes(linears: Iterable[LinearShape]) -> npt.NDArray[Any]:
    return np.array([(one.rows, one.columns) for one in linears], dtype="<i4")


def _joined(parts: Iterable[Sequence[float]], dtype: str) -> npt.NDArray[Any]:
    return np.array([value for part in parts for value in part], dtype=dtype)


def _points(allocator: Allocator, maps: Sequence[GroupWidths]) -> Arrays:
    points = [allocator.point(flat) for flat in maps]
    return {
        name: np.array([getattr(point, name) for point in points], dtype="<f8")
        for name in CurvePoint.model_fields
    }
