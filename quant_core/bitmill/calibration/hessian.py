"""Second moments of a linear's inputs.

    H = sum_t a_t x_t x_t^T / sum_t a_t          a_t = 1, or a weight per token

`HessianAccumulator` takes the inputs batch by batch and sums in fp32. A token weight (for example
the squared gradient of the loss at the linear's output) makes H the curvature of the loss instead
of the layer's own error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from bitmill.errors import CalibrationError
from bitmill.runtime.deferred_reads import ReadLater
from bitmill.runtime.ranks import Ranks
from bitmill.runtime.timer import timed
from bitmill.solvers.factor import mirrored
from bitmill_kernels.linalg.hessian import hessian_update

NAMED_ROWS = 8


class HessianAccumulator:
    """Weighted mean of x x^T over calibration tokens, fp32 [K, K] on one device.

    `name` is the linear (or input) that messages speak of. diagonal: only x^2 is summed, [K].
    """

    def __init__(
        self,
        columns: int,
        device: torch.device | str,
        *,
        name: str = "input",
        diagonal: bool = False,
    ) -> None:
        self.name, self.columns = name, columns
        self.tokens = 0
        shape = (columns,) if diagonal else (columns, columns)
        self._sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self._mass = torch.zeros((), dtype=torch.float64, device=device)
        self._unchecked: list[Tensor] = []

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Adds inputs x [T, K] (bf16, fp16 or f32), weighted by f32 [T] >= 0 where given."""
        with timed("hessian"):
            self._unchecked.append(x.sum(1, dtype=torch.float32))
            if self._sum.ndim == 2:
                hessian_update(self._sum, x, weight)
            else:
                scaled = x if weight is None else x * weight.sqrt()[:, None]
                norms = torch.linalg.vector_norm(scaled, dim=0, dtype=torch.float32)
                self._sum += norms.square()
        self._mass += x.shape[0] if weight is None else weight.double().sum()
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """H f32 [K, K], symmetric, or its diagonal; 0 where no token (of an expert) was added."""
        mean = self._sum / self._mass.clamp(min=torch.finfo(torch.float32).tiny).float()
        return mirrored(mean) if mean.ndim == 2 else mean

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


def all_reduce(hessians: Collection[HessianAccumulator], group: Ranks) -> Callable[[], None]:
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
