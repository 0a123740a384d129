"""`load`: a packed folder as a transformers model, or an error; never a half-loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from bitmill.config.bit_width_map import LinearShape
from bitmill.errors import FormatError
from bitmill.formats.codec import open_checkpoint
from bitmill.inference.hf_quantizer import plain_shapes, quantized_linears
from bitmill.io.atomic import read_json
from bitmill.models.dtypes import as_dtype


def load(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    device_map: str | dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a packed causal language model, ready to run.

    dtype: compute dtype of everything that is not packed, also by name; "auto" is the source
    model's own.
    device_map: as in `from_pretrained`, in place of `device`; it needs the package accelerate.
    Packed linears lay themselves out on their input's device at their first use.

    Raises InputError for an unknown dtype, and FormatError naming the tensor or key at fault: where
    the folder is not a packed model of a known format version, where a tensor is missing,
    superfluous or of the wrong shape or dtype, and where stored values are illegal.
    """
    folder = Path(folder)
    if dtype != "auto":
        dtype = as_dtype(dtype)
    checkpoint = open_checkpoint(folder)
    refuse_unreadable(folder, checkpoint.format.name)
    checkpoint.check_linears(model_shapes(folder))
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # reported in `info`, where they are refused by name
        output_loading_info=True,
        device_map=device_map,
    )
    refuse_incomplete(info)
    for name, module in quantized_linears(model).items():
        module.stored(name)
    if device_map is None:
        model.to(device)
    return model


def refuse_unreadable(folder: Path, name: str) -> None:
    """Raise FormatError where transformers has no quantizer for the folder's format.

    It would warn, and fill every quantized linear with random numbers.
    """
    method = read_json(folder / "config.json").get("quantization_config", {}).get("quant_method")
    if method not in AUTO_QUANTIZER_MAPPING:
        raise FormatError(
            f"{folder.name} is in format {name!r}, which transformers has no quantizer for: import "
            "the package that brings one, or read weights by bitmill.formats.codec",
            code="no_loader",
            param="quantization_config",
        )


def model_shapes(folder: Path) -> list[LinearShape]:
    """Shapes of all linears of a folder's causal language model, from config.json alone."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return plain_shapes(model)


def refuse_incomplete(info: dict[str, Any]) -> None:
    """Raise FormatError if transformers' loading report has any key that did not find its place."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        keys = sorted(map(str, info.get(problem) or ()))
        if keys:
            raise FormatError(
                f"the checkpoint does not fit its model: {len(keys)} "
                f"{problem.replace('_', ' ')}, first {keys[0]}",
                code="incomplete_checkpoint",
                param=keys[0],
            )
