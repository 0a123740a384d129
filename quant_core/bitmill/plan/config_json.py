"""Reading a stranger's config.json: bounded, and stripped of everything that could load code.

transformers has loaded code named by a config even where the caller forbade it, so keys that name
code, kernels or other repositories are removed before it sees the file, absurd sizes are refused,
and a model that exists only as code beside its weights is refused with the reason. Torch-free.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bitmill.errors import ModelError
from bitmill.io.bounded_json import shown
from bitmill.io.safetensors import INDEX_NAME, SINGLE_FILE
from bitmill.plan.architectures import ARCHITECTURES, Architecture, architecture

MAX_CONFIG = 1 << 20
CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"

_DROPPED = frozenset(
    {
        "auto_map",
        "trust_remote_code",
        "attn_implementation",
        "custom_pipelines",
        "transformers_weights",
    }
)
_KEPT_PRIVATE = frozenset({"_remove_final_layer_norm"})
_DROPPED_ENDINGS = ("_module", "_implementation")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack")

LIMITS: dict[str, int] = {
    "hidden_size": 65536,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 512,
    "vocab_size": 1 << 21,
    "num_attention_heads": 1024,
    "head_dim": 8192,
    "num_experts": 4096,
    "max_position_embeddings": 1 << 24,
}
"""Largest accepted value of each size in a config."""

_SPELLINGS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "n_embed", "d_model"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "vocab_size": ("vocab_size",),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "head_dim": ("head_dim",),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "seq_length"),
}


def sanitize(value: Any) -> Any:
    """A copy without private keys and those that name code, kernels or files, at any depth."""
    if isinstance(value, list):
        return [sanitize(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: sanitize(item)
        for key, item in value.items()
        if (key in _KEPT_PRIVATE or not key.startswith("_"))
        and key not in _DROPPED
        and (key == "quantization_config" or not key.endswith(_DROPPED_ENDINGS))
    }


def size_of(config: dict[str, Any], key: str) -> int | None:
    """One of `LIMITS`' sizes under whichever spelling the model uses; None where it has none.

    Raises `ModelError` for a value that is not a whole number from 1 to the limit.
    """
    for spelling in _SPELLINGS[key]:
        value = config.get(spelling)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= LIMITS[key]:
            raise ModelError(
                f"config.json: {spelling} is {shown(value)}, accepted are 1 to {LIMITS[key]}",
                code="bad_config",
                param=spelling,
            )
        return value
    return None


def _required(config: dict[str, Any], key: str) -> int:
    value = size_of(config, key)
    if value is None:
        raise ModelError(
            f"config.json has none of {', '.join(_SPELLINGS[key])}", code="bad_config", param=key
        )
    return value


def _load(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelError(
            f"{folder.name} has no config.json: give a Hugging Face model folder, or name a .gguf "
            "file in it",
            code="missing_file",
            param=CONFIG_FILE,
        )
    if path.stat().st_size > MAX_CONFIG:
        raise ModelError(
            f"config.json has {path.stat().st_size} bytes, the limit is {MAX_CONFIG}",
            code="bad_config",
            param=CONFIG_FILE,
        )
    try:
        config = json.loads(path.read_bytes())
        _refuse_infinity(config)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"config.json cannot be read: {error}", code="bad_config", param=CONFIG_FILE
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError("config.json names no model_type", code="bad_config", param="model_type")
    return config


def _refuse_infinity(value: Any, path: str = "") -> None:
    """Raise `ModelError` naming the key of a number that JSON has no spelling for.

    Python reads NaN, Infinity and numbers like 1e999, which no other reader of JSON need take.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_infinity(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            _refuse_infinity(item, f"{path}[{place}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ModelError(
            f"config.json: {path[:100]} is {value}, which is no number in JSON: correct it",
            code="bad_config",
            param=path[:100],
        )


def _refuse_remote_code(config: dict[str, Any]) -> None:
    auto_map = config.get("auto_map")
    if config["model_type"] in ARCHITECTURES or not isinstance(auto_map, dict):
        return
    raise ModelError(
        f"model_type {config['model_type'][:100]!r} needs code from the model's folder (auto_map: "
        f"{str(next(iter(auto_map.values()), ''))[:100]}); Bitmill never runs such code. Use a "
        "model that transformers itself implements",
        code="remote_code",
        param="auto_map",
    )


DTYPES = ("float32", "float16", "bfloat16", "float64")
"""Precisions that a model may be said to be in."""


def check_config(config: dict[str, Any]) -> Architecture:
    """Refuse unsupported, already quantized or absurdly large models; return the architecture."""
    _refuse_remote_code(config)
    found = architecture(config["model_type"][:100])
    if config.get("quantization_config") is not None:
        raise ModelError(
            "the model is already quantized (config.json has a quantization_config); give the "
            "full-precision model",
            code="already_quantized",
            param="quantization_config",
        )
    weights = config.get("transformers_weights")
    if weights not in (None, SINGLE_FILE, INDEX_NAME):
        raise ModelError(
            f"config.json says that the weights are in {str(weights)[:100]!r}: call the file "
            f"{SINGLE_FILE} and take transformers_weights out",
            code="bad_config",
            param="transformers_weights",
        )
    _check_dtype(config)
    for key in LIMITS:
        size_of(config, key)
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        _required(config, key)
    return found


def _check_dtype(config: dict[str, Any]) -> None:
    """Refuse a precision that transformers loads no model in, under its new and its old key."""
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if value is not None and str(value).removeprefix("torch.") not in DTYPES:
            raise ModelError(
                f"config.json: {key} is {shown(value)}, accepted are {', '.join(DTYPES)}",
                code="bad_config",
                param=key,
            )


def read_config(folder: Path) -> tuple[dict[str, Any], Architecture]:
    """The sanitized config of a model folder and its architecture.

    Raises `ModelError` with code missing_file, bad_config, remote_code, unsupported_architecture or
    already_quantized.
    """
    config = _load(folder)
    found = check_config(config)
    return sanitize(config), found


def refuse_adapter(folder: Path) -> None:
    """Raise `ModelError` where a folder is an adapter, or a model with one beside it.

    Which of the two transformers loads depends on whether the package peft is installed.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise ModelError(
            f"{folder.name} holds {ADAPTER_FILE}, so it is an adapter of another model: merge it "
            "into that model and give the result, or take the file out",
            code="unmerged_adapter",
            param=ADAPTER_FILE,
        )


def refuse_pickles(folder: Path) -> None:
    """Raise `ModelError` (pickle_refused) where weights exist only in formats that can run code.

    Such files beside safetensors are ignored: nothing ever opens them.
    """
    if any(folder.glob("*.safetensors")):
        return
    names = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if names:
        raise ModelError(
            f"{names[0]} is a pickle or another format that can run code when opened; Bitmill "
            "reads safetensors and GGUF only. Convert the model to safetensors first",
            code="pickle_refused",
            param=names[0],
        )
    raise ModelError(
        f"{folder.name} holds no *.safetensors file", code="missing_file", param="model.safetensors"
    )
