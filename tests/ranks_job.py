"""Profiles and refined blocks of a tiny model by one rank or several: a job without stages."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitmill.allocation.allocator import allocate
from bitmill.allocation.profile import ProfileConfig, ProfileOrigin, SensitivityProfile
from bitmill.calibration.kept_weights import KeptWeights
from bitmill.calibration.windows import CalibrationSet
from bitmill.config.quantization import parse_config
from bitmill.evaluation.logits import StreamedLogits, perplexity_and_kl
from bitmill.io.atomic import write_json
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import make_plan
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.results import LinearResult
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


def bytes_of(out: Path) -> dict[str, bytes]:
    """Every file of a job, by its path in `out`."""
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }


def assert_near(
    out: Path, alone: tuple[Path, RefinedModel], *, costs: float, codes: float
) -> list[tuple[LinearResult, LinearResult]]:
    """What several ranks left in `out` against what one did; the reports of every linear by both.

    costs: how far those of the profiles may be off, relative. codes: share of the first three
    linears' codes, before a rounded sum can have grown, that must be the same. The map is.
    """
    folder, one = alone
    for kind in ("knapsack", "sba"):
        found, expected = (SensitivityProfile.load(at / f"{kind}.npz") for at in (out, folder))
        for mine, theirs in zip(found.linears, expected.linears, strict=True):
            np.testing.assert_allclose(mine.costs, theirs.costs, rtol=costs)
        for name, record in expected.sba.get(3, {}).items():
            np.testing.assert_allclose(found.sba[3][name].kl, record.kl, rtol=0.01)
    assert (out / "map.json").read_bytes() == (folder / "map.json").read_bytes()
    several = RefinedModel(out / "refine", one.plan)
    for name in (linear.name for linear in one.plan.block_linears(0)[:3]):
        same = several.linear(name).codes == one.linear(name).codes
        assert same.float().mean() > codes, name
    reports = list(zip(several.reports()[0], one.reports()[0], strict=True))
    assert all((mine.name, mine.tokens) == (other.name, other.tokens) for mine, other in reports)
    return reports
