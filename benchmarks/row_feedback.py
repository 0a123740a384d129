"""What metrics of feedback promise of trellis codes, without encoding anything.

    python benchmarks/row_feedback.py SOURCE --block 10 --windows 8 --held-out 4 --length 512

SOURCE is a Hugging Face folder. Errors of an encoder are taken for white noise of the weights' own
variance in each row and group, carried on by the feedback of H = mean a x x^T (columns, by tiles)
and, where asked for, of B = mean b g g^T (rows, in bands). What they cost on held-out tokens is

    mean_t (g_t^T E x_t)^2 = mean_t (sum_n r_n^2 (V g_t)_n^2) (sum_k s_k^2 (U x_t)_k^2)

to second order, with U and V the factors of both, their tiles on the diagonal made the identity, g
the loss gradient at the outputs. The table has ratios to today's columns with all tokens alike and
0.5 % of damping.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bitmill.calibration.gradients import GradientPass, PassSettings
from bitmill.calibration.windows import calibration_tokens
from bitmill.config.quantization import Budget, Calibration, QuantizationConfig
from bitmill.models.dtypes import compute_dtype
from bitmill.models.streamed import StreamedModel, weight_of
from bitmill.plan.model_plan import make_plan
from bitmill.quant.codes import group_slices
from bitmill.quant.rotation import rotate
from bitmill.runtime.process import computing
from bitmill.solvers.factor import activation_order, factor
from bitmill_kernels.trellis.layout import TILE

BALANCING = 4


class Seen:
    """Inputs and gradients of every linear of one block."""

    def __init__(self) -> None:
        self.parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def seen(self, name: str, x: Tensor, gradient: Tensor) -> None:
        self.parts.setdefault(name, []).append((x.float().clone(), gradient.float().clone()))

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """x [T, K] and g [T, N]."""
        xs, gs = zip(*self.parts[name], strict=True)
        return torch.cat(xs), torch.cat(gs)


def unit_factor(H: Tensor, damping: float, band: int) -> Tensor:
    """U of H, its blocks of `band` on the diagonal made the identity."""
    upper = factor(H, ladder=(damping, 0.5)).upper
    made = upper.clone()
    for start in range(0, len(upper), band):
        own = slice(start, start + band)
        block = upper[own, own].contiguous()
        made[own] = torch.linalg.solve_triangular(block, upper[own].contiguous(), upper=True)
    return made


def variances(W: Tensor) -> tuple[Tensor, Tensor]:
    """r^2 [N] and s^2 [K] whose products are the variances of rows in groups."""
    columns = torch.ones(W.shape[1], device=W.device)
    rows = W.square().mean(1)
    for _ in range(BALANCING):
        for _, part in group_slices(W.shape[1]):
            columns[part] = (W[:, part].square().mean(1) / rows).mean()
        rows = (W.square() / columns).mean(1)
    return rows, columns


def ratios(W: Tensor, x: Tensor, g: Tensor, count: int) -> Iterator[tuple[str, float]]:
    """Cost of each metric over the first one's; `count` tokens are the calibration's."""
    order = activation_order(x[:count].square().mean(0))
    W, x = rotate(W[:, order]), rotate(x[:, order])
    rows, columns = variances(W)
    seen, received = x[:count], g[:count]
    energy = received.square().sum(1)
    metrics = {
        "alike": seen.T @ seen / count,
        "weighted": (seen * energy[:, None]).T @ seen / energy.sum(),
    }

    def cost(U: Tensor, V: Tensor | None) -> float:
        left = g[count:] if V is None else g[count:] @ V.T
        right = (x[count:] @ U.T).square() @ columns
        return float((left.square() @ rows * right).mean())

    first = None
    for name, H in metrics.items():
        for damping in (0.005, 0.05):
            found = cost(unit_factor(H, damping, TILE), None)
            first = found if first is None else first
            yield f"{name} {damping:g}", found / first
    assert first is not None
    U, B = unit_factor(metrics["weighted"], 0.05, TILE), received.T @ received
    for damping in (0.05, 0.3):
        for band in (TILE, 128):
            found = cost(U, unit_factor(B, damping, band)) / first
            yield f"weighted 0.05, rows {damping:g} by {band}", found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    plan = make_plan(options.source, QuantizationConfig(budget=Budget(bits=16)))
    asked = Calibration(sequences=options.windows, length=options.length, held_out=options.held_out)
    tokens = calibration_tokens(asked, options.source, rows=plan.vocab_size)
    device = torch.device(options.device)
    model = StreamedModel(options.source, plan, device=device, dtype=compute_dtype(device, plan))
    observer = Seen()
    with computing():
        windows = torch.cat([tokens.tokens, tokens.held_out])
        GradientPass(model, windows, PassSettings(batch=2)).run(
            lambda i: observer if i == options.block else None
        )
        block = model.load_block(options.block)
        for n, (name, module) in enumerate(model.linears(block, options.block).items()):
            x, g = observer.of(name)
            W = weight_of(module).detach().float()
            found = dict(ratios(W, x, g, tokens.tokens.numel()))
            if n == 0:
                print(f"| linear | {' | '.join(found)} |\n|{'---|' * (len(found) + 1)}")
            cells = " | ".join(f"{value:.2f}" for value in found.values())
            print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
