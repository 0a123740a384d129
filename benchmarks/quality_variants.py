"""Named variants of `results.py`: each row of the ablation table, and how it is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from bitmill.calibration.gradients import PassSettings
from bitmill.config.methods import Statistic
from bitmill.quant.grid import ClipSettings
from bitmill.refinement.block import RefineSettings
from bitmill.sensitivity.fisher import SensitivitySettings
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.gptq.solve import GptqSolver
from bitmill.solvers.grid_search import CompensatedSettings
from bitmill.solvers.rtn import RtnSolver

WIDTHS = (1, 2, 3, 4, 5, 6)


@dataclass(frozen=True)
class Variant:
    """One row: an allocation to a budget of code bits, and a refinement.

    source_inputs: refinement sees the source model's inputs, not those of the quantized prefix.
    value_basis: v_proj and o_proj stand in another basis, see `value_basis.py`.
    """

    name: str
    method: Literal["uniform", "sba", "knapsack"]
    code_bits: float
    order: Literal["natural", "activation"]
    refine: RefineSettings
    profile: SensitivitySettings = field(default_factory=SensitivitySettings)
    source_inputs: bool = False
    fuse_siblings: bool = False
    value_basis: bool = False


def gptq(
    *,
    clip: ClipSettings | None = None,
    compensated: bool = False,
    rounds: int = 0,
) -> RefineSettings:
    """GPTQ, everything off unless asked for."""
    settings = GptqSettings(
        clip=clip or ClipSettings(),
        compensated=CompensatedSettings() if compensated else None,
        rounds=rounds,
    )
    return RefineSettings(GptqSolver(settings))


def corrected(refine: RefineSettings, ridges: tuple[float, ...] = (0.0,)) -> RefineSettings:
    """The same with the correction for the prefix."""
    assert isinstance(refine.solver, GptqSolver)
    needs = frozenset[Statistic]({"hessian", "shift"})
    return replace(refine, solver=replace(refine.solver, ridges=ridges), needs=needs)


SHRINK = gptq(clip=ClipSettings(zero_offsets=(), least_squares=0))
CLIP = gptq()
COMPENSATED = gptq(compensated=True)
POLISHED = gptq(rounds=4)
FULL = gptq(compensated=True, rounds=4)
RESIDUAL = corrected(FULL)
CHOSEN_RIDGE = corrected(FULL, GptqSolver.ridges)
MORE_RIDGES = corrected(FULL, (0.05, 0.2, 0.5, 1.0, 2.0))

COST = SensitivitySettings(widths=WIDTHS, gradients=PassSettings(batch=8))

BUDGETS = (4.0, 3.0, 2.5, 2.0)


def variants() -> Iterator[Variant]:
    """All rows, in the order in which they are worth running."""
    for bits in BUDGETS:
        for name, refine in REFINEMENTS.items():
            yield knapsack(f"knapsack{bits:g}-{name}", bits, refine)
    yield from uniform_rows()
    yield from sba_rows()
    yield from profile_rows()


REFINEMENTS = {
    "full": FULL,
    "residual": RESIDUAL,
    "residual-ridge": CHOSEN_RIDGE,
    "residual-more-ridges": MORE_RIDGES,
    "residual-clip": corrected(CLIP),
    "clip": CLIP,
    "compensated": COMPENSATED,
    "polished": POLISHED,
    "shrink": SHRINK,
    "minmax": gptq(clip=ClipSettings.min_max()),
}


def uniform_rows() -> Iterator[Variant]:
    """Every group alike."""
    rtn = RefineSettings(RtnSolver(ClipSettings.min_max()))
    yield Variant("uniform3-rtn-minmax", "uniform", 3.0, "natural", rtn)
    for bits in (3.0, 4.0, 2.0):
        for order in ("natural", "activation"):
            tag = f"uniform{bits:g}" + ("-act" if order == "activation" else "")
            for name, refine in REFINEMENTS.items():
                yield Variant(f"{tag}-{name}", "uniform", bits, order, refine)


def sba_rows() -> Iterator[Variant]:
    """SliM-LLM's pattern inside every linear."""
    for order in ("activation", "natural"):
        tag = "sba3" + ("-act" if order == "activation" else "")
        for name, refine in REFINEMENTS.items():
            yield Variant(f"{tag}-{name}", "sba", 3.0, order, refine)


def profile_rows() -> Iterator[Variant]:
    """Other profiles, orders and statistics, under one refinement."""
    for bits in (3.0, 2.0):
        tag = f"knapsack{bits:g}"
        yield replace(knapsack(f"{tag}-sourceinputs", bits, FULL), source_inputs=True)
        yield replace(knapsack(f"{tag}-natural", bits, FULL), order="natural")
        yield replace(knapsack(f"{tag}-residual-natural", bits, RESIDUAL), order="natural")
        yield replace(knapsack(f"{tag}-fused", bits, FULL), fuse_siblings=True)
        yield replace(knapsack(f"{tag}-residual-fused", bits, RESIDUAL), fuse_siblings=True)
        for name, refine in (("", FULL), ("-residual-ridge", CHOSEN_RIDGE)):
            basis = replace(knapsack(f"{tag}{name}-basis", bits, refine), value_basis=True)
            yield basis
            yield replace(basis, name=f"{tag}{name}-fused-basis", fuse_siblings=True)
        ridge = knapsack(f"{tag}-residual-ridge-fused", bits, CHOSEN_RIDGE)
        yield replace(ridge, fuse_siblings=True)


def knapsack(
    name: str,
    bits: float,
    refine: RefineSettings,
    *,
    profile: SensitivitySettings = COST,
) -> Variant:
    """One knapsack row in activation order."""
    return Variant(name, "knapsack", bits, "activation", refine, profile)
