"""Writing and reading GGUF files (`formats/gguf/format.py`), by the package gguf."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from bitmill.config.bit_width_map import LinearShape
from bitmill.formats.codec import Supply
from bitmill.formats.export_folder import ExportFolder
from bitmill.formats.format import Contents
from bitmill.formats.gguf.format import BLOCK, FILE_NAME, Gguf, GgufInfo
from bitmill.formats.gguf.header import NAMES, frequencies, head_size, settings_of, stored_name
from bitmill.formats.gguf.tokenizer import tokenizer_settings
from bitmill.formats.one_width_codes import OneWidth
from bitmill.formats.writing import DTYPES, copy_companions, tensor_bytes
from bitmill.io.atomic import disk_errors
from bitmill.io.gguf import TYPES, GgufHeader, read_gguf_header
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.gguf_models import read_model

Array = np.ndarray[Any, Any]


class GgufCodec:
    """See `formats/codec.py`."""

    def __init__(self, settings: Gguf) -> None:
        self._settings = settings

    def write(
        self,
        folder: Path,
        contents: Contents,
        supply: Supply,
        on_linear: Callable[[str], None] = lambda _: None,
    ) -> dict[str, str]:
        """One file, `model.gguf`, linear by linear; and the companions of the packed folder."""
        plan, bits = contents.plan, self._settings.bits(contents)
        config, kind = dict(supply.settings), plan.model_type
        tensors = self._settings.tensors(contents)
        with disk_errors(folder):
            writer = self._begun(folder, config, tensors, supply.folder)
            digests: dict[str, str] = {}

            def put(name: str, data: Array) -> None:
                digests[name] = hashlib.sha256(data.tobytes()).hexdigest()
                writer.write_tensor_data(data)

            for linear in plan.linears:
                found = OneWidth.of(linear.name, supply.linear(linear.name), BLOCK)
                rows = _file_rows(kind, f"{linear.name}.weight", linear.rows, config)
                name = stored_name(kind, f"{linear.name}.weight")
                put(name, _blocks(found, bits[linear.name])[rows])
                on_linear(linear.name)
            for tensor in plan.tensors:
                value = _kept(kind, tensor.name, supply.other(tensor.name), config)
                name = stored_name(kind, tensor.name)
                put(name, np.frombuffer(tensor_bytes(value), np.uint8))
            if factors := frequencies(config):
                put(tensors[-1].name, np.array(factors, np.float32))
            writer.close()
            copy_companions(supply.folder, folder)
        return digests

    def open(self, folder: Path) -> GgufFolder:
        """See `formats/codec.py`."""
        header = read_gguf_header(folder / FILE_NAME)
        headers: dict[str, TensorInfo] = {
            name: GgufInfo(name, TYPES[tensor.kind][0], tensor.shape, FILE_NAME)
            for name, tensor in header.tensors.items()
        }
        return GgufFolder(folder, headers, self._settings, header)

    def kept(self, weight: Tensor) -> Tensor:
        """Itself."""
        return weight

    def _begun(
        self, folder: Path, config: dict[str, Any], tensors: list[TensorInfo], source: Path
    ) -> gguf.GGUFWriter:
        """A file with its header inside, to which tensors are added in their order."""
        name = NAMES[config["model_type"]]
        words: dict[str, Any] = {}
        if self._settings.tokenizer:
            words = tokenizer_settings(source, config, self._settings.pretokenizer)
        writer = gguf.GGUFWriter(folder / FILE_NAME, name)
        for key, value in settings_of(config).items():
            _add(writer, f"{name}.{key}", value)
        _add(writer, f"{name}.vocab_size", config["vocab_size"])
        for key, value in words.items():
            _add(writer, f"tokenizer.{key}", value)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.dtype]
            stored = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
            writer.add_tensor_info(
                tensor.name, stored, np.dtype(np.uint8), tensor.nbytes, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return writer


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _blocks(linear: OneWidth, bits: int) -> Array:
    """u8 [N, bytes of a row] of blocks of 32 weights, in the layout of `TYPE_OF[bits]`."""
    codes = linear.signed(bits).numpy()
    N, K = codes.shape
    codes = codes.reshape(N, K // BLOCK, BLOCK)
    scales = linear.scales.T.contiguous().numpy().view(np.uint8).reshape(N, K // BLOCK, 2)
    if bits == 8:
        data: list[Array] = [scales, codes ^ np.uint8(128)]
    else:
        low = codes & 15
        data = [scales, low[..., :16] | low[..., 16:] << 4]
        if bits == 5:
            data.insert(1, np.packbits(codes >> 4, axis=-1, bitorder="little"))
    blocks: Array = np.concatenate(data, axis=-1)
    return blocks.reshape(N, -1)


def _file_rows(kind: str, name: str, rows: int, config: Mapping[str, Any]) -> Array | slice:
    """The rows of a tensor in the file's order: rotary halves of llama's queries and keys lie
    interleaved there."""
    part = name.split(".")[-2]
    if NAMES[kind] != "llama" or part not in ("q_proj", "k_proj"):
        return slice(None)
    head = head_size(config)
    order: Array = np.arange(rows).reshape(-1, 2, head // 2).swapaxes(1, 2).reshape(-1)
    return order


def _kept(kind: str, name: str, value: Tensor, config: Mapping[str, Any]) -> Tensor:
    """A tensor that is not quantized, as the file has it."""
    rows = _file_rows(kind, name, len(value), config)
    if not isinstance(rows, slice):
        value = value[torch.from_numpy(rows)]
    if value.dim() == 1:
        value = value.float()
    return value + 1 if kind.startswith("gemma") and name.endswith("norm.weight") else value


@dataclass(frozen=True)
class GgufFolder(ExportFolder):
    """A folder with one GGUF file."""

    format: Gguf
    header: GgufHeader

    @property
    def file_bytes(self) -> int:
        """Bytes of the file behind its header."""
        begin = min(tensor.begin for tensor in self.header.tensors.values())
        return (self.folder / FILE_NAME).stat().st_size - begin

    def tensor(self, name: str) -> Tensor:
        """A tensor as the file has it; blocks as bytes u8 [N, bytes of a row]."""
        tensor = self.header.tensors[name]
        raw = np.fromfile(self.folder / FILE_NAME, np.uint8, tensor.nbytes, offset=tensor.begin)
        found = torch.from_numpy(raw)
        dtype = DTYPES.get(TYPES[tensor.kind][0])
        if dtype is None:
            return found.view(*tensor.shape[:-1], -1)
        return found.view(dtype).view(tensor.shape)

    def weight(self, shape: LinearShape) -> Tensor:
        """A linear's weight f32 [N, K], by the dequantization of the package gguf."""
        part = read_model(self.header).parts[f"{shape.name}.weight"]
        tensor = self.header.tensors[part.stored]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        values = gguf.quants.dequantize(self.tensor(part.stored).numpy(), kind)
        if part.operation == "rotary":
            values = values.reshape(part.heads[0], -1, 2, shape.columns).swapaxes(1, 2)
        return torch.from_numpy(values.astype(np.float32).reshape(shape.rows, shape.columns))
