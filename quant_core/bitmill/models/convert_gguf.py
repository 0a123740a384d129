"""A GGUF file turned into an ordinary Hugging Face folder: float32 safetensors and a tokenizer.

Configuration and names are those of `plan/gguf_models.py`; the package gguf dequantizes one tensor
at a time, and `gguf_tokenizer.py` has the tokenizer. What comes out is the source model of the job.
The folder appears whole or not at all, so an interrupted conversion is simply run again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import transformers
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitmill.errors import ModelError, raise_resource_error
from bitmill.io.atomic import atomic_folder
from bitmill.io.gguf import TYPES, GgufHeader, read_gguf_header
from bitmill.io.safetensors import ShardWriter
from bitmill.models.gguf_tokenizer import save_gguf_tokenizer
from bitmill.plan.config_json import check_config
from bitmill.plan.gguf_models import GgufModel, GgufPart, read_model

CONVERSION_VERSION = 3
"""Raised whenever the same file would become another folder."""

Array = np.ndarray[Any, Any]


def convert_gguf(path: Path, target: Path) -> None:
    """Write the model of one GGUF file to the folder `target`: about 4 bytes per weight.

    Needs the memory of its largest tensor a few times. Raises `ModelError` for a damaged or
    unsupported file or a tokenizer that the installed transformers builds wrongly, `ResourceError`
    where the disk is full.
    """
    header = read_gguf_header(path)
    model = read_model(header)
    check_config(model.config)
    with atomic_folder(target) as folder:
        config = _config(path, model)
        config.save_pretrained(folder)
        transformers.GenerationConfig.from_model_config(config).save_pretrained(folder)
        save_gguf_tokenizer(path, folder)
        _save_weights(header, model, folder)


def _config(path: Path, model: GgufModel) -> Any:
    """The configuration; whatever transformers raises over it is the file's fault."""
    try:
        config = transformers.AutoConfig.for_model(**model.config)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.config["model_type"]]]
        config.dtype = "float32"
        return config
    except Exception as error:
        raise_resource_error(error)
        raise ModelError(
            f"{path.name} cannot be converted: {' '.join(str(error).split())[:500]}",
            code="bad_gguf",
            param=path.name,
        ) from error


def _save_weights(header: GgufHeader, model: GgufModel, folder: Path) -> None:
    """Write all tensors, in shards with an index where one file would be too large."""
    infos = [part.info for part in model.parts.values()]
    with ShardWriter(folder, infos) as writer:
        for part in model.parts.values():
            values = restore(read_part(header, part), part)
            writer.write(part.info.name, np.ascontiguousarray(values).reshape(-1).view("u1").data)
    writer.write_index(model.parts)


def read_part(header: GgufHeader, part: GgufPart) -> Array:
    """The stored values of a tensor, or of one element of its first axis, f32 in its shape."""
    tensor = header.tensors[part.stored]
    shape, begin, count = tensor.shape, tensor.begin, tensor.nbytes
    if part.index is not None:
        count //= shape[0]
        begin, shape = begin + part.index * count, shape[1:]
    raw = np.fromfile(header.path, "u1", count, offset=begin)
    name, _, _ = TYPES[tensor.kind]
    if name in ("F32", "F16"):
        return raw.view("<f4" if name == "F32" else "<f2").astype("<f4").reshape(shape)
    rows = raw.reshape(*shape[:-1], -1)
    values: Array = dequantize(rows, GGMLQuantizationType(tensor.kind))
    return values.astype("<f4", copy=False).reshape(shape)


def restore(values: Array, part: GgufPart) -> Array:
    """The values as transformers keeps them: what the file's writer did to them, undone."""
    heads, keys = part.heads
    rest = values.shape[1:]
    if part.operation == "rotary":
        halves = values.reshape(heads, -1, 2, *rest)
        return halves.swapaxes(1, 2).reshape(values.shape)
    if part.operation == "minus one":
        return values - np.float32(1)
    if part.operation == "transposed":
        return values.T
    if part.operation == "bloom qkv":
        by_kind = values.reshape(3, heads, -1, *rest)
        return by_kind.swapaxes(0, 1).reshape(values.shape)
    if part.operation == "falcon qkv":
        rows = len(values) // (heads + 2 * keys)
        parts = np.split(values, [heads * rows, (heads + keys) * rows])
        grouped: Array = np.concatenate(
            [piece.reshape(keys, -1, rows, *rest) for piece in parts], axis=1
        )
        return grouped.reshape(values.shape)
    return values
