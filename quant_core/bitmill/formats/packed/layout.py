"""Names, dtypes and shapes of every tensor of a packed checkpoint, in the order they are filed.

The weight of a quantized linear gives way to the linear's packed tensors; every other tensor of
the source keeps its name and dtype. Budgets are computed from this list and the writer writes
this list, so the size is known before anything is written.

Torch-free: the service and the allocator import it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from bitmill.config.bit_width_map import NO_OUTLIERS, LinearShape
from bitmill.config.transforms import Outliers
from bitmill.errors import FormatError
from bitmill.io.safetensors import TensorInfo
from bitmill_kernels.layout import code_tensor_shapes, scale_tensor_shapes, zero_tensor_shapes
from bitmill_kernels.trellis.layout import circle_shapes


def linear_tensors(
    shape: LinearShape,
    widths: Sequence[int],
    *,
    owns_order: bool = False,
    code: str = "affine",
    outliers: int = 0,
) -> list[TensorInfo]:
    """Packed tensors of one linear, its bias excepted; `owns_order` adds the column order,
    `outliers` as many columns in 16 bits.

    Raises FormatError unless `widths` names one legal width per group.
    """
    prefix, N, K = shape.name, shape.rows, shape.columns
    shapes = circle_shapes if code == "trellis" else code_tensor_shapes
    try:
        planes = shapes(N, K, widths)
    except ValueError as error:
        raise FormatError(f"{prefix}: {error}", param=prefix) from error
    specs = [TensorInfo(f"{prefix}.{key}", "U8", size) for key, size in planes.items()]
    if owns_order:
        specs.append(TensorInfo(f"{prefix}.order", "I32", (K,)))
    if code == "trellis":
        specs.append(TensorInfo(f"{prefix}.row_scales", "F16", (N,)))
        return [*specs, TensorInfo(f"{prefix}.group_scales", "F16", (shape.groups,))]
    scales = scale_tensor_shapes(N, widths)
    specs += [TensorInfo(f"{prefix}.{key}", "F16", size) for key, size in scales.items()]
    zeros = zero_tensor_shapes(N, widths)
    specs += [TensorInfo(f"{prefix}.{key}", "U8", size) for key, size in zeros.items()]
    beside = Outliers(count=outliers).stored(shape)
    return specs + [replace(tensor, name=f"{prefix}.{tensor.name}") for tensor in beside]


def stored_tensors(
    kept: Sequence[TensorInfo],
    shapes: Sequence[LinearShape],
    linears: Mapping[str, Sequence[int]],
    orders: Mapping[str, str | None] | None = None,
    code: str = "affine",
    outliers: Mapping[str, int] = NO_OUTLIERS,
    affine: Collection[str] = (),
) -> list[TensorInfo]:
    """Every tensor of the packed checkpoint: the linears' in the order of `shapes`, then `kept`.

    kept: tensors taken over from the source as they are (biases, norms, embeddings)
    linears: widths of each linear of `shapes`
    orders: name of the tensor that holds a linear's column order, by linear; None is natural
    outliers: number of outlier columns of the linears that have some
    affine: names of the linears in affine codes, whatever `code` of the others is

    Raises FormatError unless `linears` covers exactly `shapes`, one legal width per group.
    """
    orders = orders or {}
    names = {shape.name for shape in shapes}
    for name in sorted(names ^ linears.keys()):
        here, there = ("map", "model") if name in linears else ("model", "map")
        raise FormatError(f"linear {name} is in the {here} but not in the {there}", param=name)
    stored: list[TensorInfo] = []
    for shape in shapes:
        owned = orders.get(shape.name) == f"{shape.name}.order"
        beside = outliers.get(shape.name, 0)
        own = "affine" if shape.name in affine else code
        stored += _known(shape, tuple(linears[shape.name]), owned, own, beside)
    return stored + list(kept)


@lru_cache(maxsize=1 << 13)
def _known(
    shape: LinearShape, widths: tuple[int, ...], owns_order: bool, code: str, outliers: int
) -> list[TensorInfo]:
    """Neighbouring maps on a curve share most of their linears."""
    return linear_tensors(shape, widths, owns_order=owns_order, code=code, outliers=outliers)
