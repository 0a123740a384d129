"""The factor of a Hessian that GPTQ needs, and what else is read off one.

    H + damping * mean(diag H) * I = (U^T U)^-1  U upper triangular

U comes from one Cholesky factorization and one triangular inverse: with J the reversal of rows and
columns, J H J = M M^T gives H^-1 = (J M^-1 J)^T (J M^-1 J), and J M^-1 J is upper triangular. The
usual route (Cholesky, inverse, Cholesky again) does three times the work and loses more digits.

Damping climbs a ladder until the factorization succeeds; every rung that failed is kept for the
report, and past the last rung the linear is refused by name. Columns whose input was zero in every
calibration token are counted: damping alone carries them, so they are rounded to the nearest code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.errors import NumericalError
from bitmill.runtime.deferred_reads import ReadLater
from bitmill_kernels.linalg.hessian import column_blocks
from bitmill_kernels.linalg.substitution import lower_inverse

DAMPING_LADDER = (0.005, 0.01, 0.05, 0.1)
"""Damping as a share of the mean of diag H."""


@dataclass(frozen=True, eq=False)
class Factor:
    """Upper U f32 [K, K], row by row, with (U^T U)^-1 = H + damping * mean(diag H) * I.

    dead: columns that no calibration token touched; failed: damping rungs whose Cholesky failed.
    """

    upper: Tensor
    damping: float
    dead: int
    failed: tuple[float, ...]


def mirrored(H: Tensor) -> Tensor:
    """H f32 [K, K] itself, with its upper triangle below the diagonal too.

    Sums over tokens differ there in their last bits, or were not made.
    """
    for columns in column_blocks(len(H)):
        upper, below = H[columns, columns].triu(), slice(columns.stop, None)
        H[columns, columns] = upper + upper.triu(1).T
        H[below, columns] = H[columns, below].T
    return H


def activation_order(energy: Tensor) -> Tensor:
    """Columns by descending mean square f32 [K], i64 [K]; equal columns keep their order."""
    return torch.argsort(energy, descending=True, stable=True)


def damped(H: Tensor, damping: float) -> Tensor:
    """A copy of H with damping * mean(diag H) on its diagonal; the identity where H is zero."""
    mean = H.diagonal().mean()
    result = H.clone()
    result.diagonal().add_(torch.where(mean > 0, damping * mean, torch.ones_like(mean)))
    return result


def factor(H: Tensor, *, ladder: tuple[float, ...] = DAMPING_LADDER, name: str = "input") -> Factor:
    """The GPTQ factor of H f32 [K, K], which is left as it was.

    Raises NumericalError, naming the linear, if H is not finite or no rung of the ladder succeeds.
    """
    return Factor(*_of_reversed_cholesky(H, ladder, name, _upper))


def squared_pivots(
    H: Tensor, *, ladder: tuple[float, ...] = DAMPING_LADDER, name: str = "input"
) -> Tensor:
    """U_jj^2 of the factor of H f32 [K, K], f32 [K], without the rest of it. Raises as `factor`."""
    return _of_reversed_cholesky(H, ladder, name, _squared_pivots)[0]


def _upper(lower: Tensor) -> Tensor:
    return lower_inverse(lower).flip(0, 1).contiguous()


def _squared_pivots(lower: Tensor) -> Tensor:
    return lower.diagonal().flip(0).square().reciprocal()


def _of_reversed_cholesky(
    H: Tensor, ladder: tuple[float, ...], name: str, wanted: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float, int, tuple[float, ...]]:
    """What is wanted of the lower M with M M^T = J (H + damping) J, the damping, dead columns and
    dampings that failed.

    Waits for the device once per damping, and has it work on what is wanted meanwhile: dropped
    where there turns out to be no such M.
    """
    finite, dead = torch.isfinite(H).all().long(), (H.diagonal() <= 0).sum()
    failed: list[float] = []
    for damping in ladder:
        # H is symmetric, and its transpose lies columns first, as LAPACK takes it
        lower, info = torch.linalg.cholesky_ex(damped(H, damping).flip(0, 1).mT)
        outcome = ReadLater(torch.stack([finite, dead, info.long()]))
        found = wanted(lower)
        del lower
        is_finite, count, broken = outcome.read()
        if not is_finite:
            raise NumericalError(
                f"the Hessian of {name} is not finite: its inputs are too large for fp32 sums; "
                "check the source model's activations",
                code="hessian_not_finite",
                param=name,
            )
        if not broken:
            return found, damping, count, tuple(failed)
        del found
        failed.append(damping)
    raise NumericalError(
        f"the Hessian of {name} ({len(H)} columns, {int(dead)} dead) is not positive definite even "
        f"with damping {ladder[-1]:.1%}: use more calibration tokens or method 'rtn'",
        code="hessian_not_positive",
        param=name,
    )
