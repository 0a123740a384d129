"""What a GGUF header says of a model: settings from config.json, names of tensors. Torch-free.

The inverse of `plan/gguf_models.py`, and held against it: a header is read again as that module
reads files, and a configuration that comes out otherwise is refused by the key that differs. So a
setting is carried over or refused, never dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmill.errors import ModelError
from bitmill.formats.older_settings import FULL, SLIDING, rope_of
from bitmill.io.gguf import GgufHeader, GgufTensor
from bitmill.plan.architectures import architecture
from bitmill.plan.gguf_models import GGUF_ARCHITECTURES, Keys

FREQUENCIES = "rope_freqs.weight"
NAMES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""model_type -> general.architecture, of the models that can be written."""

_ACTIVATIONS = {"gemma2": "gelu_pytorch_tanh", "gemma3_text": "gelu_pytorch_tanh"}
_NOT_COMPARED = frozenset(
    {"model_type", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"}
)
_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


def head_size(config: Mapping[str, Any]) -> int:
    """Columns of a head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings below the architecture's prefix, by name."""
    rope, kind = rope_of(config), config["model_type"]
    found: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head_size(config),
        "attention.value_length": head_size(config),
        "rope.dimension_count": head_size(config),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope.get("rope_type") == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind in ("gemma2", "gemma3_text") and config.get("sliding_window"):
        found["attention.sliding_window"] = config["sliding_window"]
    if kind == "gemma2":
        found["attn_logit_softcapping"] = float(config.get("attn_logit_softcapping") or 0)
        found["final_logit_softcapping"] = float(config.get("final_logit_softcapping") or 0)
    if kind == "gemma3_text":
        found["rope.freq_base_swa"] = float(rope_of(config, SLIDING)["rope_theta"])
    return found


def frequencies(config: Mapping[str, Any]) -> list[float]:
    """Factors of Llama 3's rotary frequencies; empty for other models."""
    rope, head = rope_of(config), head_size(config)
    if rope.get("rope_type") != "llama3":
        return []
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, head, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / head)
        smooth = min(max((original / length - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return factors


def stored_name(model_type: str, name: str) -> str:
    """A tensor's name in the file. Raises ModelError for one that the architecture lacks."""
    found = GGUF_ARCHITECTURES[NAMES[model_type]]
    path, _, leaf = name.rpartition(".")
    inside = path.removeprefix(f"{architecture(model_type).blocks}.")
    block, _, module = inside.partition(".")
    if inside != path:
        names = {other: own for own, other in found.inside.items()}
        if module in names:
            return f"blk.{block}.{names[module]}.{leaf}"
    else:
        names = {other: own for own, other in found.outside.items()}
        if path in names:
            return f"{names[path]}.{leaf}"
    raise ModelError(f"GGUF has no name for {name} of a {model_type} model", param=name)


@dataclass(frozen=True)
class _Header(GgufHeader):
    """A header that is still to be written."""

    factors: list[float]

    def floats(self, name: str) -> list[float]:
        return self.factors


def differences(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What of config.json a header cannot say, a sentence each. tensors: shapes by stored name."""
    missing = [key for key in _NEEDED if config.get(key) is None]
    if missing:
        yield f"config.json lacks {missing[0]}"
        return
    kind = str(config["model_type"])
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if activation != _ACTIVATIONS.get(kind, "silu"):
        yield f"hidden_act {activation!r} cannot be said in a header"
    if kind == "mistral" and config.get("sliding_window"):
        yield f"sliding_window {config['sliding_window']} is not applied by llama.cpp"
    if config.get("use_sliding_window"):
        yield "use_sliding_window cannot be said in a header"
    name = NAMES[kind]
    factors = frequencies(config)
    shapes = dict(tensors) | ({FREQUENCIES: (len(factors),)} if factors else {})
    header = _Header(
        Path("model.gguf"),
        {f"{name}.{key}": value for key, value in settings_of(config).items()},
        {key: GgufTensor(shape, 0, 0, 0) for key, shape in shapes.items()},
        factors,
    )
    keys = Keys(header, name)
    try:
        read = GGUF_ARCHITECTURES[name].config(keys)
        keys.check_all_taken()
    except ModelError as error:
        yield error.message
        return
    for key, value in read.items():
        if key in _NOT_COMPARED or (key != "rope_parameters" and config.get(key) is None):
            continue
        asked: Any = config.get(key)
        if key == "rope_parameters":
            yield from _rope_differences(config, value)
        elif asked != value:
            yield f"{key} {asked!r} would be read as {value!r}"


def _rope_differences(config: Mapping[str, Any], read: Mapping[str, Any]) -> Iterator[str]:
    for kind in (FULL, SLIDING):
        asked, found = rope_of(config, kind), read.get(kind, read)
        if kind == SLIDING and kind not in read:
            return
        for key in asked.keys() & found.keys():
            same = asked[key] == found[key]
            if not same and isinstance(asked[key], int | float):
                same = math.isclose(asked[key], found[key], rel_tol=1e-5)
            if not same:
                yield f"{key} {asked[key]!r} would be read as {found[key]!r}"
        if asked.get("rope_type", "default") != found.get("rope_type"):
            yield f"rope_type {asked.get('rope_type')!r} cannot be said in a header"
