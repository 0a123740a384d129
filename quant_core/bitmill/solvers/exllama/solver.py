"""GPTQ's column loop with every group on a grid of ExLlamaV2 (`quant/exl2_grid.py`)."""

from __future__ import annotations

from collections.abc import MutableSequence

import torch
from torch import Tensor

from bitmill.quant import exl2_grid
from bitmill.quant.codes import row_errors
from bitmill.quant.grid import Grid
from bitmill.runtime.ranks import Ranks
from bitmill.solvers.exllama.settings import ExLlama
from bitmill.solvers.gptq.column_loop import column_loop
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.solver import Linear, Solved


class ExLlamaSolver:
    """See `solvers/solver.py`."""

    @classmethod
    def of(cls, _: ExLlama) -> ExLlamaSolver:
        """The solver of a method's settings."""
        return cls()

    def solve(self, linears: MutableSequence[Linear], H: Tensor | None, ranks: Ranks) -> Solved:
        """No correction for the prefix; codes are stored as the loop finds them."""
        assert H is not None
        curvature = Curvature.prepare(H, name=linears[0].name, ranks=ranks)
        diagonal = H.diagonal()

        def fit(block: Tensor, width: int, part: slice) -> Grid:
            return exl2_grid.fit(block, width, diagonal[part])

        weights, errors, results = [], [], []
        for linear in linears:
            codes = column_loop(linear.W, curvature, linear.widths, fit)
            before, after = (row_errors(R, H).sum() for R in (linear.W, linear.W - codes.values()))
            weights.append(codes.finish())
            errors.append(torch.stack([before, after, after]))
            found = linear.result()
            results.append(found.model_copy(update={"damping": curvature.factor.damping}))
        return Solved(weights, results, torch.stack(errors))
