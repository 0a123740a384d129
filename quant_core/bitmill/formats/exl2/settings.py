"""What exllamav2 0.3.2 reads of a config.json (its config.py and architecture.py). Torch-free.

It chooses a model by `architectures`, and of Gemma 3 knows the one with pictures alone, whose text
model lies below `language_model.` and needs no tensor of the rest. Any other name it would compute
as llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitmill.formats.older_settings import SLIDING, not_granted, older_names, rope_of

ARCHITECTURES: Mapping[str, str] = {
    "gemma3_text": "Gemma3ForConditionalGeneration",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""model_type -> the name that it knows the model by, of those that are written."""
_PREFIXES = {"gemma3_text": "language_model."}
_ROPES = ("default", "linear", "llama3")
"""Rotary embeddings that it computes as transformers does, by the names of transformers."""
_LOCAL_THETA = 10000.0
"""Of Gemma 3's windows; it reads none."""


def prefix(model_type: str) -> str:
    """What its names of tensors begin with."""
    return _PREFIXES.get(model_type, "")


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What it reads by other names or values than config.json has."""
    return older_names(config) | {"architectures": [ARCHITECTURES[config["model_type"]]]}


def unsaid(config: Mapping[str, Any]) -> list[str]:
    """Why what config.json says would not be computed."""
    found = not_granted(config, "ExLlamaV2")
    kind, rope = config.get("model_type"), rope_of(config)
    if (type_ := rope.get("rope_type", "default")) not in _ROPES:
        found.append(f"rope_type {type_!r} is not computed the same, only {', '.join(_ROPES)}")
    if rope.get("partial_rotary_factor", 1) != 1:
        found.append(f"partial_rotary_factor {rope['partial_rotary_factor']} is read elsewhere")
    if config.get("mlp_bias"):
        found.append("mlp_bias: it moves rows of up and gate, and leaves their biases in place")
    if kind == "mistral" and config.get("sliding_window"):
        found.append(f"sliding_window {config['sliding_window']} is not applied to this type")
    if kind == "gemma3_text":
        local = rope_of(config, SLIDING)
        local_type, theta = local.get("rope_type", "default"), local["rope_theta"]
        if (local_type, theta) != ("default", _LOCAL_THETA):
            asked = f"the windows' rope_theta {theta} ({local_type})"
            found.append(f"{asked} is not read: it takes {_LOCAL_THETA}")
        if config.get("use_bidirectional_attention"):
            found.append("use_bidirectional_attention is not read")
    return found
