"""Transforms by name: what they store, and where they are found. Torch-free.

A transform rewrites linears before they are solved (`transforms/transform.py`); its rewrite stays
with the quantized weight (`quant/rewrites.py`). Its configuration class holds its settings and says
what else must be known of it without torch. `TRANSFORMS` finds them by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from bitmill.config.bit_width_map import LinearShape
from bitmill.config.closed import Closed
from bitmill.io.safetensors import TensorInfo
from bitmill.registry import Registry


class TransformConfig(Closed):
    """Base of the settings of all transforms.

    name: as users write it. transform: place of the class of `transforms.transform.Transform` that
    is made from the settings
    rewrite: place of the class of `quant.rewrites.Rewrite` that it fits
    online: whether inputs change where the linear computes, even if nothing is stored
    folded: whether `transform` names a `transforms.transform.ChannelScaling` instead, whose scales
    go into the norm or linear before and leave nothing behind; `rewrite` has no meaning then
    of_source: whether it rewrites the whole source model before all else, which then is the source
    (`plan/source_model.py`); neither `rewrite` nor `stored` has a meaning then
    needs: the statistics that it looks at; methods that collect less refuse it
    """

    name: ClassVar[str]
    transform: ClassVar[str]
    rewrite: ClassVar[str]
    online: ClassVar[bool] = False
    folded: ClassVar[bool] = False
    of_source: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def stored(self, shape: LinearShape) -> tuple[TensorInfo, ...]:
        """What one linear's rewrite stores, by the names behind the linear's; the format that
        stores it puts the linear's before them."""
        raise NotImplementedError


class ColumnOrder(TransformConfig):
    """Packed column k is input column order[k]; `allocation.order` asks for it."""

    name: ClassVar[str] = "order"
    transform: ClassVar[str] = "bitmill.transforms.column_order:ColumnOrders"
    rewrite: ClassVar[str] = "bitmill.quant.rewrites:ColumnOrder"

    def stored(self, shape: LinearShape) -> tuple[TensorInfo, ...]:
        return (TensorInfo("order", "I32", (shape.columns,)),)


class Rotation(TransformConfig):
    """Columns are rotated inside their groups (`bitmill.quant.rotation`)."""

    name: ClassVar[str] = "rotation"
    transform: ClassVar[str] = "bitmill.transforms.rotation:Rotations"
    rewrite: ClassVar[str] = "bitmill.quant.rotation:Rotation"
    online: ClassVar[bool] = True

    def stored(self, shape: LinearShape) -> tuple[TensorInfo, ...]:
        return ()


class Outliers(TransformConfig):
    """`count` columns of a linear stay in 16 bits beside its codes; `allocation.outliers` asks for
    it, and the map has the numbers."""

    name: ClassVar[str] = "outliers"
    transform: ClassVar[str] = "bitmill.transforms.outliers:OutlierColumns"
    rewrite: ClassVar[str] = "bitmill.quant.outliers:Outliers"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    count: int = 0

    def stored(self, shape: LinearShape) -> tuple[TensorInfo, ...]:
        """Packed columns and their values, of a linear that has some."""
        if not self.count:
            return ()
        return (
            TensorInfo("outlier_columns", "I32", (self.count,)),
            TensorInfo("outliers", "F16", (shape.rows, self.count)),
        )


def transform_of(asked: Mapping[str, Any]) -> TransformConfig:
    """The typed settings of {"name": ..., settings}; raises `SpecError` for an unknown name,
    pydantic's `ValidationError` for settings that it has not."""
    settings = dict(asked)
    return TRANSFORMS[str(settings.pop("name", ""))].model_validate(settings)


TRANSFORMS: Registry[type[TransformConfig]] = Registry(
    "transform",
    "bitmill.transforms",
    {
        "awq": "bitmill.transforms.awq.settings:AWQ",
        "order": "bitmill.config.transforms:ColumnOrder",
        "outliers": "bitmill.config.transforms:Outliers",
        "quarot": "bitmill.transforms.quarot.settings:QuaRot",
        "rotation": "bitmill.config.transforms:Rotation",
        "smoothquant": "bitmill.transforms.smoothquant.settings:SmoothQuant",
    },
)
