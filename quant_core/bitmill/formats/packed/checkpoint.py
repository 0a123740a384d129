"""A packed Hugging Face folder: writing it tensor by tensor, and reading it with every check.

Reading trusts nothing: format version, names, shapes, dtypes, scales, zeros, column orders and
padding bits are checked, and a FormatError names the tensor at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap, LinearShape
from bitmill.errors import FormatError
from bitmill.formats.codec import Supply
from bitmill.formats.format import Contents, order_owners
from bitmill.formats.packed.config import PackedConfig, PackedLinear
from bitmill.formats.packed.format import Packed
from bitmill.formats.packed.headers import PackedHeaders
from bitmill.formats.packed.layout import linear_tensors
from bitmill.formats.reading import TensorFolder
from bitmill.formats.writing import (
    copy_companions,
    source_settings,
    write_settings,
    write_tensors,
)
from bitmill.io.atomic import disk_errors, write_bytes
from bitmill.io.safetensors import MAX_SHARD_BYTES, TensorInfo
from bitmill.quant.outliers import Outliers
from bitmill.quant.rewrites import Rewrites, check_order
from bitmill.quant.rotation import packed_rewrites
from bitmill.quant.tensors import KINDS, Stored


def write_checkpoint(
    folder: Path,
    *,
    source: Path,
    tensors: Sequence[TensorInfo],
    bit_widths: BitWidthMap,
    linear: Callable[[str], Stored],
    other: Callable[[str], Tensor],
    orders: Mapping[str, str | None] | None = None,
    code: str = "affine",
    affine: Collection[str] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_linear: Callable[[str], None] = lambda _: None,
) -> dict[str, str]:
    """Write a packed model into the existing, empty `folder`.

    source: folder of the source model; its config and tokenizer are taken over
    tensors: what `stored_tensors` gives for this map, in that order
    linear, other: supply a quantized linear by its name, any other tensor by its own
    orders: name of the tensor that holds a linear's column order; code: of all groups, but those
        of the linears in `affine`
    max_shard_bytes, on_linear, what is returned and raised: as of `write_tensors`
    """
    config = PackedConfig.from_map(bit_widths, orders, code, affine)
    settings = source_settings(source)

    def packed_tensors(name: str) -> dict[str, Tensor]:
        weight = linear(name)
        beside = weight.rewrites.tensors(name)
        if not config.linears[name].owns_order:
            beside.pop(f"{name}.order", None)
        return weight.tensors(name) | beside

    digests = write_tensors(
        folder,
        tensors,
        config.linears,
        packed_tensors,
        other,
        max_shard_bytes=max_shard_bytes,
        on_linear=on_linear,
    )
    with disk_errors(folder):
        copy_companions(source, folder)
    write_bytes(folder / MAP_NAME, bit_widths.to_json().encode())
    write_settings(folder, settings | {"quantization_config": config.to_dict()})
    return digests


class PackedCodec:
    """Writes and opens packed folders (`formats/codec.py`)."""

    def __init__(self, settings: Packed) -> None:
        self._settings = settings

    def write(
        self,
        folder: Path,
        contents: Contents,
        supply: Supply,
        on_linear: Callable[[str], None] = lambda _: None,
    ) -> dict[str, str]:
        """See `write_checkpoint`."""
        owners = order_owners(contents.plan, contents.order)
        return write_checkpoint(
            folder,
            source=supply.folder,
            tensors=self._settings.tensors(contents),
            bit_widths=contents.bit_widths,
            linear=supply.linear,
            other=supply.other,
            orders={name: f"{owner}.order" for name, owner in owners.items()},
            code=self._settings.code,
            affine={matrix.name for matrix in contents.plan.embeddings},
            on_linear=on_linear,
        )

    def open(self, folder: Path) -> PackedCheckpoint:
        """See `PackedCheckpoint.open`."""
        return PackedCheckpoint.open(folder)

    def kept(self, weight: Tensor) -> Tensor:
        """Itself."""
        return weight


@dataclass(frozen=True)
class PackedCheckpoint(PackedHeaders, TensorFolder):
    """A packed folder whose config and headers were read; tensors are read on demand."""

    def check_linears(self, shapes: Iterable[LinearShape]) -> None:
        """Compare the stored linears' headers with the model's shapes, by name.

        Raises FormatError naming the first tensor that is missing, superfluous or of another
        dtype or shape.
        """
        by_name = {shape.name: shape for shape in shapes}
        for name, packed in self.config.linears.items():
            if name not in by_name:
                raise FormatError(f"linear {name} is not in the model", param=name)
            self.check_linear(by_name[name], packed)

    def check_linear(self, shape: LinearShape, packed: PackedLinear) -> None:
        """Compare the headers of one linear with its shape; raises as `check_linears` does."""
        expected = linear_tensors(
            shape,
            packed.widths,
            owns_order=packed.owns_order,
            code=packed.code,
            outliers=packed.outliers,
        )
        self.check_headers(expected)
        self.check_no_others(shape.name, {spec.name for spec in expected})

    def linear(self, shape: LinearShape) -> Stored:
        """The packed tensors of one linear, its column order included, checked in full."""
        packed = self.config.linears.get(shape.name)
        if packed is None:
            raise FormatError(f"linear {shape.name} is not quantized here", param=shape.name)
        order = self.tensor(packed.order) if packed.order else None
        if order is not None:
            check_order(order, shape.columns, packed.order or "")
        rewrites, code = packed_rewrites(packed.code, order), packed.code
        if packed.outliers:
            beside = {key: self.tensor(f"{shape.name}.{key}") for key in Outliers.stored}
            rewrites = Rewrites([*rewrites, Outliers.from_tensors(beside)])
        names = [spec.name for spec in linear_tensors(shape, packed.widths, code=code)]
        tensors = {name: self.tensor(name) for name in names if name in self.headers}
        return KINDS[code].from_tensors(
            shape.name, tensors, shape.rows, shape.columns, packed.widths, rewrites
        )

    def weight(self, shape: LinearShape) -> Tensor:
        """A linear's dequantized weight f32 [N, K] in the source's columns."""
        return self.linear(shape).unpack().dequantize()
