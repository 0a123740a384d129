"""A packed Hugging Face folder: writing it tensor by tensor, and reading it with every check.

Reading trusts nothing: format version, names, shapes, dtypes, scales, zeros, column orders and
padding bits are checked, and a FormatError names the tensor at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap, LinearShape
from bitmill.errors import FormatError, ModelError
from bitmill.formats.codec import CONFIG_NAME, Supply
from bitmill.formats.format import Contents, order_owners
from bitmill.formats.packed.config import PackedConfig
from bitmill.formats.packed.format import Packed
from bitmill.formats.packed.layout import linear_tensors
from bitmill.formats.writing import copy_companions, write_tensors
from bitmill.io.atomic import disk_errors, read_json, write_bytes, write_json
from bitmill.io.safetensors import (
    MAX_SHARD_BYTES,
    TensorInfo,
    read_headers,
    safetensors_files,
)
from bitmill.plan.config_json import sanitize
from bitmill.quant.rewrites import Rewrites, check_order
from bitmill.quant.tensors import PackedTensor, Stored


def write_checkpoint(
    folder: Path,
    *,
    source: Path,
    tensors: Sequence[TensorInfo],
    bit_widths: BitWidthMap,
    linear: Callable[[str], Stored],
    other: Callable[[str], Tensor],
    orders: Mapping[str, str | None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_linear: Callable[[str], None] = lambda _: None,
) -> dict[str, str]:
    """Write a packed model into the existing, empty `folder`.

    source: folder of the source model; its config and tokenizer are taken over
    tensors: what `stored_tensors` gives for this map, in that order
    linear, other: supply a quantized linear by its name, any other tensor by its own
    orders: name of the tensor that holds a linear's column order
    max_shard_bytes, on_linear, what is returned and raised: as of `write_tensors`
    """
    config = PackedConfig.from_map(bit_widths, orders)

    def packed_tensors(name: str) -> dict[str, Tensor]:
        weight = linear(name)
        tensors = weight.tensors(name)
        if config.linears[name].owns_order:
            tensors |= weight.rewrites.tensors(name)
        return tensors

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
    write_packed_config(source, folder, config)
    return digests


def write_packed_config(source: Path, folder: Path, config: PackedConfig) -> None:
    """Write config.json: the source's without keys that name code, and with the packed format."""
    settings = sanitize(read_json(source / CONFIG_NAME))
    if settings.get("quantization_config"):
        raise ModelError(
            f"{CONFIG_NAME} of the source has a quantization_config already: "
            "give the model that was quantized, not its quantized copy",
            code="already_quantized",
            param="quantization_config",
        )
    write_json(folder / CONFIG_NAME, settings | {"quantization_config": config.to_dict()})


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
            on_linear=on_linear,
        )

    def open(self, folder: Path) -> PackedCheckpoint:
        """See `PackedCheckpoint.open`."""
        return PackedCheckpoint.open(folder)

    def kept(self, weight: Tensor) -> Tensor:
        """Itself."""
        return weight


@dataclass(frozen=True)
class PackedCheckpoint:
    """A packed folder whose config and headers were read; tensors are read on demand."""

    folder: Path
    config: PackedConfig
    headers: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> PackedCheckpoint:
        """Read config.json and the safetensors headers.

        Raises FormatError for a config that is not of a packed model, ModelError for safetensors
        files that are missing or damaged.
        """
        settings = read_json(folder / CONFIG_NAME)
        quantization = settings.get("quantization_config") if isinstance(settings, dict) else None
        if not isinstance(quantization, dict):
            raise FormatError(
                f"{folder.name} is not a packed model: {CONFIG_NAME} has no quantization_config",
                param=CONFIG_NAME,
            )
        return cls(folder, PackedConfig.from_dict(quantization), read_headers(folder))

    @property
    def format(self) -> Packed:
        """Its format."""
        return Packed()

    @property
    def bit_widths(self) -> BitWidthMap:
        """The map's file. Raises FormatError unless it gives the widths of config.json."""
        found = BitWidthMap.load(self.folder / MAP_NAME)
        if self.config.widths != found.linears:
            raise FormatError(f"{MAP_NAME} and {CONFIG_NAME} give different widths", param=MAP_NAME)
        return found

    @property
    def file_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(file.stat().st_size for file in safetensors_files(self.folder))

    def check_linears(self, shapes: Iterable[LinearShape]) -> None:
        """Compare the stored linears' headers with the model's shapes, by name.

        Raises FormatError naming the first tensor that is missing, superfluous or of another
        dtype or shape.
        """
        by_name = {shape.name: shape for shape in shapes}
        for name, packed in self.config.linears.items():
            if name not in by_name:
                raise FormatError(f"linear {name} is not in the model", param=name)
            expected = linear_tensors(by_name[name], packed.widths, owns_order=packed.owns_order)
            for spec in expected:
                _check_header(self.headers.get(spec.name), spec)
            self._check_no_others(name, {spec.name for spec in expected})

    def tensor(self, name: str) -> Tensor:
        """A stored tensor by its name, on the CPU. Raises FormatError where it is missing."""
        if name not in self.headers:
            raise FormatError(f"tensor {name} is missing from the checkpoint", param=name)
        path = self.folder / self.headers[name].file
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def linear(self, shape: LinearShape) -> PackedTensor:
        """The packed tensors of one linear, its column order included, checked in full."""
        packed = self.config.linears.get(shape.name)
        if packed is None:
            raise FormatError(f"linear {shape.name} is not quantized here", param=shape.name)
        order = self.tensor(packed.order) if packed.order else None
        if order is not None:
            check_order(order, shape.columns, packed.order or "")
        rewrites = Rewrites.of_order(order)
        names = [spec.name for spec in linear_tensors(shape, packed.widths)]
        tensors = {name: self.tensor(name) for name in names if name in self.headers}
        return PackedTensor.from_tensors(
            shape.name, tensors, shape.rows, shape.columns, packed.widths, rewrites
        )

    def weight(self, shape: LinearShape) -> Tensor:
        """A linear's dequantized weight f32 [N, K] in the source's columns."""
        return self.linear(shape).unpack().dequantize()

    def _check_no_others(self, linear: str, expected: set[str]) -> None:
        prefix = f"{linear}."
        for name in self.headers:
            if name.startswith(prefix) and name not in expected | {f"{linear}.bias"}:
                raise FormatError(f"tensor {name} does not belong to the format", param=name)


def _check_header(found: TensorInfo | None, spec: TensorInfo) -> None:
    if found is None:
        raise FormatError(f"tensor {spec.name} is missing from the checkpoint", param=spec.name)
    if found.dtype != spec.dtype or found.shape != spec.shape:
        raise FormatError(
            f"tensor {spec.name} is {found.dtype} of shape {found.shape}: "
            f"the format says {spec.dtype} of shape {spec.shape}",
            param=spec.name,
        )
