"""What each decoder block of a model caches of a token, from names and shapes. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitmill.config.closed import Closed
from bitmill.plan.architectures import Architecture

_SEPARATE = ("k_proj", "v_proj")
_FUSED = ("qkv_proj", "query_key_value", "c_attn")
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
_ATTENTION = ("self_attn", "self_attention", "attention", "attn")


class CacheLayer(Closed):
    """values: of keys and values of one token; window: tokens that are held, None for all."""

    values: int
    window: int | None = None


def cache_layers(config: Mapping[str, Any], found: Architecture) -> tuple[CacheLayer, ...]:
    """One entry for each block of the model of a sanitized config.json.

    A window counts only where the config lists the layers that have one; without a list all
    tokens count, which is never too little.
    """
    parameters = found.parameters(config)
    rows: dict[int, dict[str, tuple[int, int]]] = {}
    for name, shape in parameters.shapes.items():
        inside, _, leaf = name.removeprefix(f"{found.blocks}.").rpartition(".")
        block, _, path = inside.partition(".")
        parent, _, linear = path.rpartition(".")
        if leaf == "weight" and parent in _ATTENTION and len(shape) == 2 and block.isdecimal():
            n, k = reversed(shape) if found.transposed else shape
            rows.setdefault(int(block), {})[linear] = (n, k)
    types = config.get("layer_types")
    repeated = found.model_type == "falcon" and config.get("new_decoder_architecture")
    window = config.get("sliding_window")
    return tuple(
        CacheLayer(
            values=_values(rows[block], repeated=bool(repeated)),
            window=window
            if isinstance(types, list)
            and isinstance(window, int)
            and window > 0
            and types[block : block + 1] == ["sliding_attention"]
            else None,
        )
        for block in sorted(rows)
    )


def _values(linears: Mapping[str, tuple[int, int]], *, repeated: bool) -> int:
    """Rows of keys and values; where they are fused with queries, those beyond the queries'.

    repeated: every query has a copy of its keys and values in the cache.
    """
    separate = [linears[name][0] for name in _SEPARATE if name in linears]
    if separate:
        return sum(separate)
    fused = next(linears[name][0] for name in _FUSED if name in linears)
    queries = next(linears[name][1] for name in _OUTPUTS if name in linears)
    return 2 * queries if repeated else fused - queries
