"""A GGUF file turned into an ordinary Hugging Face folder: float32 safetensors and a tokenizer.

transformers dequantizes the file (`gguf_file=`); what it yields is the source model of the job. The
folder appears whole or not at all, so an interrupted conversion is simply run again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from bitmill.errors import ModelError, raise_resource_error
from bitmill.formats.packed.checkpoint import tensor_bytes
from bitmill.io.atomic import atomic_folder
from bitmill.io.gguf import gguf_config, gguf_tensors, read_gguf_header
from bitmill.io.safetensors import ShardWriter, TensorInfo
from bitmill.plan.config_json import check_config


def _save_weights(model: nn.Module, names: Iterable[str], folder: Path) -> None:
    """Write the named parameters, in shards with an index where one file would be too large."""
    tensors = {name: model.get_parameter(name).detach().contiguous() for name in names}
    infos = [TensorInfo(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
    with ShardWriter(folder, infos) as writer:
        for name, value in tensors.items():
            writer.write(name, tensor_bytes(value))
    writer.write_index(tensors)


def _load(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer; whatever the libraries raise over a damaged file is the file's fault."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:
        raise_resource_error(error)
        raise ModelError(
            f"{path.name} cannot be converted: {str(error)[:500]}",
            code="bad_gguf",
            param=path.name,
        ) from error
    return model, tokenizer


def convert_gguf(path: Path, target: Path) -> None:
    """Write the model of one GGUF file to the folder `target`: about 4 bytes per weight.

    Needs that much memory too. Raises `ModelError` for a damaged or unsupported file,
    `ResourceError` where the disk is full.
    """
    found = read_gguf_header(path)
    check_config(gguf_config(found))
    names = gguf_tensors(path, found)
    model, tokenizer = _load(path)
    config = model.config
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with atomic_folder(target) as folder:
        _save_weights(model, names, folder)
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
