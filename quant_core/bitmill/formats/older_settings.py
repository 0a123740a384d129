"""What runtimes read of a config.json that know it from before transformers 5. Torch-free.

transformers 5 says `rope_parameters` and `layer_types` where mlx-lm 0.32 and exllamav2 0.3 read
`rope_theta`, `rope_scaling`, `rope_local_base_freq` and `sliding_window_pattern` of most
architectures, and take their own defaults where these are missing. Some settings they take for
granted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GRANTED = {
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "use_sliding_window": False,
}
"""The only value that both compute with, of the model types that are written for them."""
FULL, SLIDING = "full_attention", "sliding_attention"


def rope_of(config: Mapping[str, Any], kind: str = FULL) -> dict[str, Any]:
    """`rope_parameters` of one kind of attention, from the keys of transformers 5 or before."""
    rope = config.get("rope_parameters")
    if rope is None:
        theta = config.get("rope_theta", 10000.0)
        if kind == SLIDING:
            return {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq", theta)}
        scaling = dict(config.get("rope_scaling") or {})
        scaling.setdefault("rope_type", scaling.pop("type", "default"))
        return {"rope_theta": theta} | scaling
    found: dict[str, Any] = rope.get(kind, rope)
    return found


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


def not_granted(config: Mapping[str, Any], runtime: str) -> list[str]:
    """Why a runtime would not compute what config.json says."""
    found = [
        f"{key} {config[key]!r} is not what {runtime} computes with, {value!r}"
        for key, value in GRANTED.items()
        if config.get(key, value) != value
    ]
    layers = config.get("layer_types") or ()
    if config.get("model_type") == "gemma3_text" and layers:
        period = _period(layers)
        if SLIDING not in layers:
            found.append(f"layer_types have no window, as {runtime} takes them to")
        elif any((kind == FULL) != ((i + 1) % period == 0) for i, kind in enumerate(layers)):
            found.append(f"layer_types are not periodic, as {runtime} takes them to be")
    return found


def _period(layers: Sequence[str]) -> int:
    """How many layers it takes to the first one without a window."""
    return layers.index(FULL) + 1 if FULL in layers else len(layers) + 1
