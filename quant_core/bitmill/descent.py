"""Adam on a module's parameters, with held-out data choosing what is kept.

The rate of step t is rate * min(1, t / warmup) * (1 + cos(pi t / steps)) / 2 (or constant, as
OmniQuant has it). The held-out loss is taken before the first step, every `evaluate_every` steps
and after the last one, and the parameters of its lowest value are what remains in the end: the
result is never worse on held-out data than the start.

Numerical policy: training losses are gathered on the device and looked at with each held-out loss.
If one of them is not finite, or the held-out loss exceeds `diverged` times the one at the start,
the best parameters come back, Adam forgets its moments and all rates are halved. After
`max_rollbacks` of these the descent gives up and keeps the best. The report counts them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DescentSettings:
    """How long and how carefully to descend; rates belong to the parameter groups."""

    steps: int
    evaluate_every: int
    warmup: int = 0
    cosine: bool = True
    diverged: float = 3.0
    max_rollbacks: int = 3
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass
class DescentReport:
    """What a descent did. Losses are held-out; `curve` holds (step, held-out loss)."""

    before: float
    after: float
    best_step: int = 0
    steps: int = 0
    rollbacks: int = 0
    gave_up: bool = False
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Rate:
    """Parameters that share one learning rate."""

    parameters: list[nn.Parameter]
    rate: float


def descend(
    rates: list[Rate],
    training_loss: Callable[[int], Tensor],
    held_out_loss: Callable[[], float],
    settings: DescentSettings,
    *,
    should_stop: Callable[[], None] | None = None,
) -> DescentReport:
    """Minimize the training loss; on return the parameters are the best on held-out data.

    training_loss: step -> scalar to backpropagate. held_out_loss: of the present parameters.
    should_stop: called with each held-out loss; it raises to end the descent.
    """
    began = time.perf_counter()
    best = _Best([p for rate in rates for p in rate.parameters])
    first = held_out_loss()
    report = DescentReport(first, first, curve=[(0, first)])
    if not math.isfinite(first):
        report.gave_up = True
        return report
    optimizer = _adam(rates, settings)
    halvings, bad = 0, torch.zeros((), dtype=torch.bool, device=best.device)
    for step in range(1, settings.steps + 1):
        _set_rates(optimizer, rates, _schedule(step, settings) * 0.5**halvings)
        optimizer.zero_grad(set_to_none=True)
        loss = training_loss(step - 1)
        loss.backward()
        bad |= ~torch.isfinite(loss.detach())
        optimizer.step()
        report.steps = step
        if step % settings.evaluate_every and step != settings.steps:
            continue
        if should_stop:
            should_stop()
        value = held_out_loss()
        report.curve.append((step, value))
        if bool(bad) or not value <= settings.diverged * first:
            best.restore()
            report.rollbacks += 1
            if report.rollbacks > settings.max_rollbacks:
                report.gave_up = True
                break
            halvings += 1
            bad.zero_()
            optimizer = _adam(rates, settings)
        elif value < report.after:
            report.after, report.best_step = value, step
            best.keep()
    best.restore()
    report.seconds = time.perf_counter() - began
    return report


class _Best:
    """A copy of the best parameters so far."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        self._copies = [p.detach().clone() for p in parameters]
        self.device = parameters[0].device

    @torch.no_grad()
    def keep(self) -> None:
        for copy, parameter in zip(self._copies, self._parameters, strict=True):
            copy.copy_(parameter)

    @torch.no_grad()
    def restore(self) -> None:
        for copy, parameter in zip(self._copies, self._parameters, strict=True):
            parameter.copy_(copy)


def _adam(rates: list[Rate], settings: DescentSettings) -> torch.optim.Adam:
    """Adam whose epsilon is far below any gradient: block losses differ by orders of magnitude."""
    groups = [{"params": rate.parameters, "lr": rate.rate} for rate in rates]
    fused = rates[0].parameters[0].is_cuda
    return torch.optim.Adam(groups, betas=settings.betas, eps=1e-15, fused=fused or None)


def _set_rates(optimizer: torch.optim.Adam, rates: list[Rate], factor: float) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate.rate * factor


def _schedule(step: int, settings: DescentSettings) -> float:
    warm = min(1.0, step / settings.warmup) if settings.warmup else 1.0
    if not settings.cosine:
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / settings.steps))
