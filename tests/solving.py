"""One linear solved by itself, in the source's columns: what tests of solvers share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitmill.quant.grid import ClipSettings
from bitmill.quant.rewrites import Rewrites
from bitmill.quant.tensors import Quantized
from bitmill.results import LinearResult
from bitmill.runtime.ranks import SINGLE
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.gptq.solve import GptqSolver
from bitmill.solvers.rtn import RtnSolver
from bitmill.solvers.solver import Correction, Linear


def quantize_gptq(
    W: Tensor,
    H: Tensor | Curvature,
    widths: Sequence[int],
    *,
    order: Tensor | None = None,
    settings: GptqSettings | None = None,
    shift: Tensor | None = None,
    ridge: float = 0.0,
    name: str = "linear",
) -> tuple[Quantized, LinearResult]:
    """W [N, K] and H [K, K] in the source's columns, or a shared Curvature without `order`.

    shift [N, K]: of a correction that its judge wants as it is solved with `ridge`.
    """
    rewrites, settings = Rewrites.of_order(order), settings or GptqSettings()
    if not isinstance(H, Curvature):
        H = Curvature.prepare(rewrites.hessian(H), damping=settings.damping, name=name)
    source, correction = rewrites.weights(W), None
    if shift is not None:
        moments = rewrites.moments(shift)
        target = source + H.solve(moments, ridge)

        def judge(candidate: Tensor) -> Tensor:
            return (candidate - target).double().square().sum()

        correction = Correction(moments, torch.arange(len(W)), judge)
    linear = Linear(name, source, tuple(widths), correction)
    solved = GptqSolver(settings, (ridge,)).solve_with([linear], H, SINGLE)
    weight, result = solved.read(SINGLE)[0]
    return weight.rewritten(rewrites), result


def quantize_rtn(
    W: Tensor,
    widths: Sequence[int],
    *,
    H: Tensor | None = None,
    order: Tensor | None = None,
    clip: ClipSettings | None = None,
) -> tuple[Quantized, LinearResult]:
    """W [N, K] and H [K, K] or None, in the source's columns."""
    rewrites = Rewrites.of_order(order)
    linear = Linear("linear", rewrites.weights(W), tuple(widths))
    H = None if H is None else rewrites.hessian(H)
    weight, result = RtnSolver(clip or ClipSettings()).solve([linear], H, SINGLE).read(SINGLE)[0]
    return weight.rewritten(rewrites), result
