"""What linears that read the same input share: H, its factor and its solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bitmill.quant.codes import row_slices
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.runtime.timer import timed
from bitmill.solvers.factor import DAMPING_LADDER, Factor, damped, factor
from bitmill_kernels.backend import resolve_backend
from bitmill_kernels.linalg.split_product import split_product
from bitmill_kernels.linalg.substitution import cholesky_solver

FACTOR_WORK = 3.0
"""Work of the factor of a Hessian and its inverse, in Cholesky factors."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """H f32 [K, K] and its factor.

    solvers: those of H with other dampings, by damping, while corrections are compared.
    """

    H: Tensor
    factor: Factor
    solvers: dict[float, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        H: Tensor,
        *,
        damping: tuple[float, ...] = DAMPING_LADDER,
        name: str = "input",
        ridges: Sequence[float] = (),
        ranks: Ranks = SINGLE,
    ) -> Curvature:
        """Raises NumericalError as `factor` does.

        ranks: those that hold this H too and will solve with these ridges. Each makes some of the
        factors for all.
        """
        with timed("factor"):
            if ranks.size == 1:
                return cls(H, factor(H, ladder=damping, name=name))
            found, ridged = _divided_factors(H, damping, name, ridges, ranks)
            return cls(H, found, {r: cholesky_solver(ridged[r]) for r in ridged})

    def solve(self, matrix: Tensor, ridge: float = 0.0) -> Tensor:
        """matrix [*, K] times the inverse of H, damped by the factor's damping or by `ridge`.

        NaN where H damped by `ridge` is not positive definite.
        """
        if not len(matrix):
            return matrix
        with timed("factor"):
            if ridge:
                if ridge not in self.solvers:
                    self.solvers[ridge] = cholesky_solver(_ridged(self.H, ridge))
                return self.solvers[ridge](matrix.T).T
            U = self.factor.upper
            return split_product(split_product(matrix, U.T), U)

    def solve_each(self, matrices: Sequence[Tensor], ridge: float = 0.0) -> list[Tensor]:
        """`solve` of matrices [N_i, K], one below the other on an accelerator."""
        if len(matrices) < 2 or resolve_backend("auto", self.H.device) != "triton":
            return [self.solve(matrix, ridge) for matrix in matrices]
        whole = self.solve(torch.cat(list(matrices)), ridge)
        return [whole[mine] for mine in row_slices(matrices)]


def _divided_factors(
    H: Tensor, ladder: tuple[float, ...], name: str, ridges: Sequence[float], ranks: Ranks
) -> tuple[Factor, dict[float, Tensor]]:
    """The factor of H, which the first rank makes, and those with ridges, which others make."""
    own = factor(H, ladder=ladder, name=name) if ranks.first else None
    firm = [ridge for ridge in ridges if ridge]
    _, *owners = ranks.owners([FACTOR_WORK, *(1.0 for _ in firm)])
    ridged = {}
    for ridge, owner in zip(firm, owners, strict=True):
        mine = owner == ranks.rank
        ridged[ridge] = _ridged(H, ridge) if mine else H.new_empty(H.shape).mT
    shared = ranks.broadcast(replace(own, upper=torch.empty(0)) if own else None)
    assert shared is not None
    found = replace(shared, upper=own.upper if own else H.new_empty(H.shape))
    ranks.share(found.upper, 0)
    for ridge, owner in zip(firm, owners, strict=True):
        ranks.share(ridged[ridge].mT, owner)
    return found, ridged


def _ridged(H: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor f32 [K, K] of H damped by `ridge`; NaN where there is none.

    It lies columns first.
    """
    lower, info = torch.linalg.cholesky_ex(damped(H, ridge).mT)
    result: Tensor = lower.mul_(torch.where(info == 0, 1.0, torch.nan))
    return result
