"""What mlx-lm reads of a config.json, and by which names. Torch-free.

transformers 5 says `rope_parameters` and `layer_types` where mlx-lm 0.32 reads `rope_theta`,
`rope_scaling`, `rope_local_base_freq` and `sliding_window_pattern` of most architectures, and takes
its own defaults where these are missing. Some settings it takes for granted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GRANTED = {
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "use_sliding_window": False,
}
"""The only value that its models of the types that are written compute with."""
FULL, SLIDING = "full_attention", "sliding_attention"


def older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The older keys for what config.json says."""
    rope = config.get("rope_parameters") or {}
    full, local = rope.get(FULL, rope), rope.get(SLIDING)
    found = {}
    if "rope_theta" in full:
        found["rope_theta"] = full["rope_theta"]
    if full.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: full[key] for key in full if key != "rope_theta"}
    if local:
        found["rope_local_base_freq"] = local["rope_theta"]
    if SLIDING in (layers := config.get("layer_types") or ()):
        found["sliding_window_pattern"] = _period(layers)
    return found


def unsaid(config: Mapping[str, Any]) -> list[str]:
    """Why what config.json says would not be computed."""
    found = [
        f"{key} {config[key]!r} is not what mlx-lm computes with, {value!r}"
        for key, value in GRANTED.items()
        if config.get(key, value) != value
    ]
    layers = config.get("layer_types") or ()
    if config.get("model_type") == "gemma3_text" and SLIDING in layers:
        period = _period(layers)
        if any((kind == FULL) != ((i + 1) % period == 0) for i, kind in enumerate(layers)):
            found.append("layer_types are not periodic, as mlx-lm takes them to be")
    return found


def _period(layers: Sequence[str]) -> int:
    """How many layers it takes to the first one without a window."""
    return layers.index(FULL) + 1 if FULL in layers else len(layers) + 1
