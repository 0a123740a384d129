"""Second moments of a linear's inputs, and the factor that GPTQ needs from them.

    H = sum_t a_t x_t x_t^T / sum_t a_t          a_t = 1, or a weight per token
    H + damping * mean(diag H) * I = (U^T U)^-1  U upper triangular

`HessianAccumulator` takes the inputs batch by batch and sums in fp32. A token weight (for example
the squared gradient of the loss at the linear's output) makes H the curvature of the loss instead
of the layer's own error.

U comes from one Cholesky factorization and one triangular inverse: with J the reversal of rows and
columns, J H J = M M^T gives H^-1 = (J M^-1 J)^T (J M^-1 J), and J M^-1 J is upper triangular. The
usual route (Cholesky, inverse, Cholesky again) does three times the work and loses more digits.

Damping climbs a ladder until the factorization succeeds; every rung that failed is kept for the
report, and past the last rung the linear is refused by name. Columns whose input was zero in every
calibration token are counted: damping alone carries them, so they are rounded to the nearest code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bitmill.errors import CalibrationError, NumericalError
from bitmill.runtime.deferred_reads import ReadLater
from bitmill.runtime.ranks import Group
from bitmill.runtime.stage_timer import stage
from bitmill_kernels.linalg.hessian import column_blocks, hessian_update
from bitmill_kernels.linalg.substitution import lower_inverse

DAMPING_LADDER = (0.005, 0.01, 0.05, 0.1)
"""Damping as a share of the mean of diag H."""

NAMED_ROWS = 8


class HessianAccumulator:
    """Weighted mean of x x^T over calibration tokens, fp32 [K, K] on one device.

    `name` is the linear (or input) that messages speak of.
    """

    def __init__(self, columns: int, device: torch.device | str, *, name: str = "input") -> None:
        self.name, self.columns = name, columns
        self.tokens = 0
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._mass = torch.zeros((), dtype=torch.float64, device=device)
        self._unchecked: list[Tensor] = []

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Adds inputs x [T, K] (bf16, fp16 or f32), weighted by f32 [T] >= 0 where given."""
        with stage("hessian"):
            self._unchecked.append(x.sum(1, dtype=torch.float32))
            hessian_update(self._sum, x, weight)
        self._mass += x.shape[0] if weight is None else weight.double().sum()
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """H f32 [K, K], symmetric; zero where no token (an expert's, say) was added."""
        mass = self._mass.clamp(min=torch.finfo(torch.float32).tiny)
        return mirrored(self._sum / mass.float())

    def check_later(self) -> Callable[[], None]:
        """What raises CalibrationError, naming the token rows, where inputs were not finite.

        It waits for the device only as far as it has come by now.
        """
        if not self._unchecked:
            return lambda: None
        bad = ~torch.isfinite(torch.cat(self._unchecked))
        self._unchecked.clear()
        return partial(_check_rows, self.name, bad, ReadLater(bad.any()))


def _check_rows(name: str, bad: Tensor, some: ReadLater) -> None:
    """The sum of a row is not finite where one of its values is not."""
    if not some.read():
        return
    rows = bad.nonzero()[:, 0].tolist()
    more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
    raise CalibrationError(
        f"{len(rows)} of {len(bad)} calibration tokens give non-finite inputs to {name}: "
        f"tokens {rows[:NAMED_ROWS]}{more}; leave that text out or run the model in a wider "
        "dtype",
        code="non_finite_calibration",
        param=name,
    )


def all_reduce(hessians: Collection[HessianAccumulator], group: Group) -> Callable[[], None]:
    """Add what the other ranks have seen; returns what checks all of this rank's inputs."""
    checks = [hessian.check_later() for hessian in hessians]
    group.all_reduce(*(sums for one in hessians for sums in (one._sum, one._mass)))
    counts = group.gather([hessian.tokens for hessian in hessians])
    for hessian, tokens in zip(hessians, zip(*counts, strict=True), strict=True):
        hessian.tokens = sum(tokens)

    def check() -> None:
        for one in checks:
            one()

    return check


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


def activation_order(H: Tensor) -> Tensor:
    """Columns by descending diag(H), i64 [K]; equal columns keep their order."""
    return torch.argsort(H.diagonal(), descending=True, stable=True)


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
