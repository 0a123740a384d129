"""A small weight, its inputs' Hessian and its rounded codes: what tests of refinement share."""

from __future__ import annotations

import torch

from bitmill.quant.codes import LinearCodes
from bitmill.quant.grid import ClipSettings
from bitmill.solvers.rtn import round_to_nearest


def problem(
    seed: int = 0, N: int = 8, K: int = 300
) -> tuple[torch.Tensor, torch.Tensor, LinearCodes]:
    """W [N, K], H [K, K] of correlated inputs, and W's nearest codes at widths 3, 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(K) + 0.2 * torch.randn(K, K, generator=generator)
    x = torch.randn(800, K, generator=generator) @ mix
    W = 0.05 * torch.randn(N, K, generator=generator)
    codes = round_to_nearest(W, (3, 1, 2), None, ClipSettings())
    return W, x.T @ x / 800, codes


def row_errors(W: torch.Tensor, codes: LinearCodes, H: torch.Tensor) -> torch.Tensor:
    """(W - ŵ) H (W - ŵ)^T of each row, f64 [N]."""
    R = (W - codes.values()).double()
    return ((R @ H.double()) * R).sum(1)
