"""What a solver is given, and what it gives: weights and statistics in, quantized tensors out.

A solver sees the linears that read one input, in packed columns: rewrites (`quant/rewrites.py`)
come before it and go with its result. Which statistics it needs its method says
(`config/methods.py`), so nothing else is collected. docs/extending.md shows how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from math import nan
from typing import Protocol

import torch
from torch import Tensor

from bitmill.config.bit_width_map import LinearShape, code_bits
from bitmill.config.methods import MethodConfig
from bitmill.errors import NumericalError
from bitmill.quant.tensors import Quantized
from bitmill.registry import load_object
from bitmill.results import LinearResult
from bitmill.runtime.ranks import Ranks

SAMPLED_ROWS = 1024
"""Rows of a linear on which its corrections are compared with each other and with none."""


@dataclass(frozen=True, eq=False)
class Correction:
    """What may move a linear's target for its already quantized prefix: the statistic "shift".

    shift: f32 [N, K], the mean (y' - y)^T x of calibration tokens, y' of the source model
    sample: rows i64 [M] on which corrections are compared
    judge: held-out error of ŵ f32 [M, K] in those rows, f64 [] on the device
    """

    shift: Tensor
    sample: Tensor
    judge: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Linear:
    """One of the linears that read one input: this rank's rows W f32 [N, K], a width per group of
    128 columns, the correction where the method needs shifts, and where it needs gradients what
    the squared error of each row counts, f32 [N] (`calibration/loss_weights.py`)."""

    name: str
    W: Tensor
    widths: tuple[int, ...]
    correction: Correction | None = None
    importance: Tensor | None = None

    def result(self) -> LinearResult:
        """Its result but for the errors, which `read_results` gives."""
        shape = LinearShape(self.name, *self.W.shape)
        return LinearResult(
            name=self.name,
            code_bits=code_bits([shape], {self.name: self.widths}),
            relative_error=nan,
            damping=0.0,
            asymmetric=False,
        )


@dataclass(frozen=True, eq=False)
class Solved:
    """Quantized linears that read one input, whose errors are still on the device.

    weights: without rewrites. results: their errors are NaN. errors: f64 [L, 3], tr(R H R^T) of
    this rank's rows for R = W, and for R = W - ŵ with ŵ by the solver's own pass and as it is
    stored.
    """

    weights: Sequence[Quantized]
    results: Sequence[LinearResult]
    errors: Tensor

    def read(self, ranks: Ranks) -> list[tuple[Quantized, LinearResult]]:
        """Weights and whole results; waits for the device."""
        return list(zip(self.weights, read_results([self], ranks), strict=True))


class Solver(Protocol):
    """What quantizes linears; made from a method's settings by what `MethodConfig.solver` names."""

    def solve(self, linears: MutableSequence[Linear], H: Tensor | None, ranks: Ranks) -> Solved:
        """Quantize linears that read one input.

        H: f32 [K, K], mean x x^T of their inputs, where the method needs statistics, else None.
        ranks: those that solve other rows of the same linears. Weights are finite. Linears may be
        replaced in the list, so that what they hold is freed.
        """


def solver_of(method: MethodConfig) -> Solver:
    """The solver of a method."""
    solver: Solver = load_object(method.solver)(method)
    return solver


def read_results(solved: Sequence[Solved], ranks: Ranks) -> list[LinearResult]:
    """Results of all linears in turn, with errors of all ranks' rows.

    Waits for the device, and for all ranks, once.
    """
    if not solved:
        return []
    totals = iter(ranks.totals(torch.cat([one.errors.flatten() for one in solved])))
    results = []
    for result in (result for one in solved for result in one.results):
        total = next(totals) or 1.0
        before, after = next(totals) / total, next(totals) / total
        gain = 1.0 - after / before if before > 0 else 0.0
        results.append(
            result.model_copy(update={"relative_error": after, "scale_refit_gain": gain})
        )
    return results


def sampled_rows(count: int, device: torch.device, part: slice | None = None) -> Tensor:
    """Those of a sample of `count` rows that lie in `part` (None: all), i64 [M], ascending.

    The sample is at most `SAMPLED_ROWS` rows, evenly spaced.
    """
    part = part or slice(0, count)
    most = min(count, SAMPLED_ROWS)
    first, last = (-(-end * most // max(count, 1)) for end in (part.start, part.stop))
    return torch.arange(first, last, device=device) * count // max(most, 1)


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Raises NumericalError, naming the linear, if one of matrices [N, K] holds NaN or infinity.

    Waits for the device once.
    """
    if not weights:
        return
    finite = torch.stack([torch.isfinite(W).all() for W in weights.values()]).tolist()
    for (name, W), good in zip(weights.items(), finite, strict=True):
        if good:
            continue
        bad = ~torch.isfinite(W)
        row, column = (int(i) for i in bad.nonzero()[0])
        raise NumericalError(
            f"{name} has {int(bad.sum())} weights that are not finite, first at row {row}, column "
            f"{column}: the source checkpoint is damaged",
            code="weights_not_finite",
            param=name,
        )
