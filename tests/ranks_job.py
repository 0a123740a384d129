"""Profiles and refined blocks of a tiny model by one rank or several: a job without stages."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from bitmill.allocation.allocator import allocate
from bitmill.allocation.profile import ProfileConfig, ProfileOrigin
from bitmill.calibration.kept_weights import KeptWeights
from bitmill.calibration.windows import CalibrationSet
from bitmill.config.quantization import parse_config
from bitmill.evaluation.logits import StreamedLogits, perplexity_and_kl
from bitmill.io.atomic import write_json
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import make_plan
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.sensitivity.measure import make_profile

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "affine": {
        "knapsack": {"kind": "knapsack", "widths": (2, 3, 4)},
        "sba": {"kind": "sba", "base": 3},
        "orders": {"kind": "orders"},
    },
    "trellis": {
        "knapsack": {"kind": "knapsack", "widths": (2, 3, 4), "code": "trellis"},
        "sba": {"kind": "sba", "base": 3, "code": "trellis"},
    },
}
"""Profiles by the code that they are for."""


def ranks_job(
    model_folder: Path,
    out: Path,
    group: Ranks = SINGLE,
    die: int | None = None,
    *,
    code: str = "affine",
    device: torch.device | None = None,
) -> RefinedModel:
    """Profiles of every kind, a knapsack map and the refined blocks, in folders of `out`.

    die: the rank that is killed when the last block is refined. device: this rank's; None for the
    CPU.
    """
    asked: dict[str, Any] = {
        "code": code,
        "budget": {"code_bits": 3},
        "allocation": {"widths": [2, 3, 4]},
        "devices": group.size,
    }
    spec = parse_config(asked)
    plan = make_plan(model_folder, spec)
    device = device or torch.device("cpu")
    model = StreamedModel(model_folder, plan, device=device, dtype=torch.float32)
    tokens = torch.randint(2, 258, (15, 64), generator=torch.Generator().manual_seed(1))
    calibration = CalibrationSet(tokens[:13], tokens[13:], "digest")
    profiles, weights = {}, KeptWeights(out / "weights", "these windows")
    for kind, settings in KINDS[code].items():
        (out / kind).mkdir(parents=True, exist_ok=True)
        profiles[kind] = make_profile(
            model,
            calibration.tokens,
            plan,
            ProfileOrigin(ProfileConfig(order="activation", **settings), "model", "digest"),
            folder=out / kind,
            on_unit=lambda *_: None,
            group=group,
            weights=weights if spec.weighs_in_profile and kind == "knapsack" else None,
        )
        if group.first:
            profiles[kind].save(out / f"{kind}.npz")
    profile = profiles["knapsack"]
    bit_widths = allocate(plan, spec, profile)
    orders = {li.name: torch.tensor(profile.orders[str(li.order)]) for li in profile.linears}
    (out / "refine").mkdir(exist_ok=True)

    def on_unit(done: int, *_: object) -> None:
        if done == plan.block_count and group.rank == die:
            os.kill(os.getpid(), signal.SIGKILL)

    refine_model(
        model,
        RefineInputs(calibration, bit_widths, {name: o.long() for name, o in orders.items()}),
        spec.method,
        out / "refine",
        seed=0,
        on_unit=on_unit,
        transforms=spec.transforms,
        group=group,
        weights=weights if spec.weighs_in_profile else None,
    )
    refined = RefinedModel(out / "refine", plan)
    measured = perplexity_and_kl(None, StreamedLogits(model), group.shard(tokens))
    windows = measured.gathered(group, len(tokens))
    if group.first:
        write_json(out / "windows.json", windows.nll.tolist())
        (out / "map.json").write_text(bit_widths.to_json())
    return refined
