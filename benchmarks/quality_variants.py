"""Named variants of `quality.py`: each row of the ablation table, and how it is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from bitmill.compensated_grid import CompensatedSettings
from bitmill.gptq import GptqSettings
from bitmill.gradient_pass import PassSettings
from bitmill.grid import ClipSettings
from bitmill.refine import RefineSettings
from bitmill.sensitivity import SensitivitySettings

WIDTHS = (1, 2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Variant:
    """One row: an allocation to a budget of code bits, and a refinement.

    weighting: power of the token weights a_t in the Hessians of refinement, 0 = plain.
    source_inputs: refinement sees the source model's inputs, not those of the quantized prefix.
    """

    name: str
    method: Literal["uniform", "sba", "knapsack"]
    code_bits: float
    order: Literal["natural", "activation"]
    refine: RefineSettings
    profile: SensitivitySettings = field(default_factory=SensitivitySettings)
    weighting: float = 0.0
    source_inputs: bool = False
    fuse_siblings: bool = False


def gptq(
    *,
    clip: ClipSettings | None = None,
    compensated: bool = False,
    rounds: int = 0,
    descent: int = 1,
    refit: int = 2,
    clip_weight: Literal["hessian", "schur"] = "hessian",
    damping: tuple[float, ...] | None = None,
) -> GptqSettings:
    """Settings of the solver, everything off unless asked for."""
    settings = GptqSettings(
        clip=clip or ClipSettings(),
        clip_weight=clip_weight,
        compensated=CompensatedSettings() if compensated else None,
        rounds=rounds,
        refit_sweeps=refit,
        descent_sweeps=descent,
    )
    return settings if damping is None else replace(settings, damping=damping)


SHRINK = RefineSettings(gptq=gptq(clip=ClipSettings.shrink_only()))
CLIP = RefineSettings(gptq=gptq())
REFIT = RefineSettings(gptq=gptq(rounds=1, descent=0))
DESCENT = RefineSettings(gptq=gptq(rounds=3))
COMPENSATED = RefineSettings(gptq=gptq(compensated=True))
FULL = RefineSettings(gptq=gptq(compensated=True, rounds=3))
INPUTS = replace(FULL, asymmetric="inputs")
RESIDUAL = replace(FULL, asymmetric="residual")

ROUNDING = SensitivitySettings(
    widths=WIDTHS, cost="rounding", clip=ClipSettings(), gradients=PassSettings(batch=8)
)
COMPENSATED_COST = replace(ROUNDING, cost="compensated")
WEIGHTED_COST = replace(COMPENSATED_COST, moments="weighted", token_weights=True)
SAMPLED_COST = replace(COMPENSATED_COST, gradients=PassSettings(batch=8, labels="sampled"))

BUDGETS = (4.0, 3.0, 2.5, 2.0)


def variants() -> Iterator[Variant]:
    """All rows, in the order in which they are worth running."""
    yield from uniform_rows()
    yield from sba_rows()
    yield from knapsack_rows()
    yield from ablation_rows()


def uniform_rows() -> Iterator[Variant]:
    rtn = RefineSettings(method="rtn", gptq=gptq(clip=ClipSettings.min_max()))
    plain = RefineSettings(gptq=gptq(clip=ClipSettings.min_max()))
    yield Variant("uniform3-rtn-minmax", "uniform", 3.0, "natural", rtn)
    yield Variant("uniform3-gptq-minmax", "uniform", 3.0, "natural", plain)
    yield Variant("uniform3-gptq-shrink", "uniform", 3.0, "natural", SHRINK)
    yield Variant("uniform3-gptq-clip", "uniform", 3.0, "natural", CLIP)
    yield Variant("uniform3-full", "uniform", 3.0, "natural", FULL)
    yield Variant("uniform3-act-shrink", "uniform", 3.0, "activation", SHRINK)
    yield Variant("uniform3-act-full", "uniform", 3.0, "activation", FULL)
    yield Variant("uniform4-full", "uniform", 4.0, "natural", FULL)
    yield Variant("uniform2-act-full", "uniform", 2.0, "activation", FULL)


def sba_rows() -> Iterator[Variant]:
    yield Variant("sba3-full", "sba", 3.0, "natural", FULL)
    yield Variant("sba3-act-clip", "sba", 3.0, "activation", CLIP)
    yield Variant("sba3-act-full", "sba", 3.0, "activation", FULL)


def knapsack_rows() -> Iterator[Variant]:
    for bits in BUDGETS:
        yield knapsack(f"knapsack{bits:g}-full", bits, FULL)
    for bits in BUDGETS:
        yield knapsack(f"knapsack{bits:g}-residual", bits, RESIDUAL)


def ablation_rows() -> Iterator[Variant]:
    for bits in (3.0, 2.0):
        tag = f"knapsack{bits:g}"
        for name, refine in (
            ("shrink", SHRINK),
            ("clip", CLIP),
            ("refit", REFIT),
            ("descent", DESCENT),
            ("compensated", COMPENSATED),
            ("inputs", INPUTS),
        ):
            yield knapsack(f"{tag}-{name}", bits, refine)
        for name, profile in (
            ("roundingcost", ROUNDING),
            ("weightedcost", WEIGHTED_COST),
            ("sampledcost", SAMPLED_COST),
        ):
            yield knapsack(f"{tag}-{name}", bits, FULL, profile=profile)
        for power in (0.5, 1.0):
            yield knapsack(
                f"{tag}-tokens{power:g}", bits, FULL, profile=WEIGHTED_COST, weighting=power
            )
        half = replace(RESIDUAL, strengths=(0.5,))
        yield knapsack(f"{tag}-residualhalf", bits, half)
        blockwise = replace(FULL, true_sequential=False)
        yield knapsack(f"{tag}-blockwise", bits, blockwise)
        yield replace(knapsack(f"{tag}-sourceinputs", bits, FULL), source_inputs=True)
        yield replace(knapsack(f"{tag}-natural", bits, FULL), order="natural")
        yield replace(knapsack(f"{tag}-fused", bits, FULL), fuse_siblings=True)


def knapsack(
    name: str,
    bits: float,
    refine: RefineSettings,
    *,
    profile: SensitivitySettings = COMPENSATED_COST,
    weighting: float = 0.0,
) -> Variant:
    """One knapsack row in activation order."""
    return Variant(name, "knapsack", bits, "activation", refine, profile, weighting)
