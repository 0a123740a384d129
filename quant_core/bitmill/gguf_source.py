"""A GGUF file turned into an ordinary Hugging Face folder: float32 safetensors and a tokenizer.

transformers dequantizes the file (`gguf_file=`); what it yields is the source model of the job. The
folder appears whole or not at all, so an interrupted conversion is simply run again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from bitmill.errors import ModelError
from bitmill.gguf_headers import gguf_config, gguf_tensors, read_gguf_header
from bitmill.model_config import check_config
from bitmill.safetensors_layout import INDEX_NAME, METADATA, TensorSpec, shard
from bitmill.storage import atomic_folder, write_json


def _save_weights(model: nn.Module, names: Iterable[str], folder: Path) -> None:
    """Write the named parameters, in shards with an index where one file would be too large."""
    tensors = {name: model.get_parameter(name).detach().contiguous() for name in names}
    specs = [TensorSpec(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
    shards = shard(specs)
    for file, part in shards.items():
        save_file({spec.name: tensors[spec.name] for spec in part}, folder / file, METADATA)
    if len(shards) > 1:
        weight_map = {spec.name: file for file, part in shards.items() for spec in part}
        total = sum(spec.bytes for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX_NAME, index)


def convert_gguf(path: Path, target: Path) -> None:
    """Write the model of one GGUF file to the folder `target`: about 4 bytes per weight.

    Needs that much memory too. Raises `ModelError` for a damaged or unsupported file,
    `ResourceError` where the disk is full.
    """
    header = read_gguf_header(path)
    check_config(gguf_config(header))
    names = gguf_tensors(path, header)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"{path.name} cannot be converted: {str(error)[:500]}",
            code="bad_gguf",
            param=path.name,
        ) from error
    config = model.config
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with atomic_folder(target) as folder:
        _save_weights(model, names, folder)
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
