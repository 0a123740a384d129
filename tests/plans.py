"""Plans and profiles made from shapes alone: no model, no weights."""

from __future__ import annotations

import numpy as np

from bitmill.allocation.profile import (
    LinearProfile,
    ProfileConfig,
    ProfileOrigin,
    SbaRecord,
    SensitivityProfile,
)
from bitmill.config.bit_width_map import LinearShape
from bitmill.plan.model_plan import Plan, PlannedLinear, PlannedTensor, Source

LLAMA_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama_plan(blocks: int = 3, hidden: int = 416, inner: int = 600, kv: int = 96) -> Plan:
    """A Llama-shaped plan with ragged groups; F32 source, tied head."""
    sizes = {
        "q_proj": (hidden, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    linears = [
        PlannedLinear(
            name=name,
            block=block,
            rows=sizes[part][0],
            columns=sizes[part][1],
            dtype="F32",
            source=Source(tensor=name + ".weight"),
        )
        for block in range(blocks)
        for part in LLAMA_PARTS
        for name in [f"model.layers.{block}.{_parent(part)}.{part}"]
    ]
    kept = [("model.embed_tokens.weight", (512, hidden)), ("model.norm.weight", (hidden,))]
    return Plan(
        model_type="llama",
        block_prefix="model.layers",
        block_count=blocks,
        hidden_size=hidden,
        vocab_size=512,
        max_positions=512,
        experts=0,
        linears=tuple(linears),
        tensors=tuple(
            PlannedTensor(name=n, module=n, dtype="F32", shape=s, source=Source(tensor=n))
            for n, s in kept
        ),
    )


def _parent(part: str) -> str:
    return "self_attn" if part in LLAMA_PARTS[:4] else "mlp"


def random_profile(
    plan: Plan,
    widths: tuple[int, ...] = (1, 2, 3, 4, 5, 6),
    seed: int = 0,
    sba: tuple[int, ...] = (),
) -> SensitivityProfile:
    """Costs that fall about fourfold a bit, spread over decades between groups."""
    rng = np.random.default_rng(seed)
    linears = []
    for shape in plan.shapes:
        scale = rng.lognormal(-4, 2, (shape.groups, 1))
        bits = np.array(widths)
        costs = scale * 4.0**-bits * rng.lognormal(0, 0.2, (shape.groups, len(widths)))
        linears.append(LinearProfile(shape.name, shape.rows, shape.columns, costs))
    return SensitivityProfile(
        origin=ProfileOrigin(ProfileConfig(seed=seed), "m", "c"),
        widths=widths,
        linears=tuple(linears),
        sba={base: _records(rng, plan.shapes) for base in sba},
    )


def _records(rng: np.random.Generator, shapes: tuple[LinearShape, ...]) -> dict[str, SbaRecord]:
    return {
        shape.name: SbaRecord(
            rng.permutation(shape.columns // 128).astype(np.int32),
            rng.random(shape.columns // 256 + 1),
        )
        for shape in shapes
    }
