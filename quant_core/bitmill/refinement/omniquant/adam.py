"""Adam on a module's parameters, with held-out data choosing what is kept.

The rate of step t is rate * min(1, t / warmup) * (1 + cos(pi t / steps)) / 2 (or constant, as
OmniQuant has it). The held-out loss is taken before the first step, every `evaluate_every` steps
and after the last one, and the parameters of its lowest value are what remains in the end: the
result is never worse on held-out data than the start.

On a GPU a step of a small block is a few hundred kernels of a few microseconds, more than a process
can launch in the time they take. Where the caller says that every step runs the same kernels on the
same memory (`record`), a step is recorded as a CUDA graph after three ordinary ones and replayed.

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
from typing import Any

import torch
from torch import Tensor, nn

ORDINARY_STEPS = 3
"""Steps before one is recorded; Adam makes its state in the first."""


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
    """What a descent did. Losses are held-out; `curve` holds (step, held-out loss).

    recorded: whether steps were replayed from a CUDA graph.
    """

    before: float
    after: float
    best_step: int = 0
    steps: int = 0
    rollbacks: int = 0
    gave_up: bool = False
    recorded: bool = False
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Rate:
    """Parameters that share one learning rate."""

    parameters: list[nn.Parameter]
    rate: float


def descend(
    rates: list[Rate],
    draw: Callable[[int], None],
    training_loss: Callable[[], Tensor],
    held_out_loss: Callable[[], float],
    settings: DescentSettings,
    *,
    record: bool = False,
) -> DescentReport:
    """Minimize the training loss; on return the parameters are the best on held-out data.

    draw: called before each step with its number, chooses the data. training_loss: scalar to
    backpropagate, on what was drawn. held_out_loss: of the present parameters. record: `draw` only
    overwrites tensors and `training_loss` reads nothing back, so a step can be replayed on a GPU.
    """
    began = time.perf_counter()
    best = _Best([p for rate in rates for p in rate.parameters])
    first = held_out_loss()
    report = DescentReport(first, first, curve=[(0, first)])
    if not math.isfinite(first):
        report.gave_up = True
        return report
    halvings, stepper = 0, _Stepper(rates, training_loss, settings, record)
    for step in range(1, settings.steps + 1):
        draw(step - 1)
        stepper.step(_schedule(step, settings) * 0.5**halvings)
        report.steps, report.recorded = step, stepper.recorded
        if step % settings.evaluate_every and step != settings.steps:
            continue
        value = held_out_loss()
        report.curve.append((step, value))
        if bool(stepper.bad) or not value <= settings.diverged * first:
            best.restore()
            report.rollbacks += 1
            if report.rollbacks > settings.max_rollbacks:
                report.gave_up = True
                break
            halvings += 1
            stepper = _Stepper(rates, training_loss, settings, record)
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

    @torch.no_grad()
    def keep(self) -> None:
        for copy, parameter in zip(self._copies, self._parameters, strict=True):
            copy.copy_(parameter)

    @torch.no_grad()
    def restore(self) -> None:
        for copy, parameter in zip(self._copies, self._parameters, strict=True):
            parameter.copy_(copy)


class _Stepper:
    """Loss, gradients and Adam, as ordinary calls or replayed from a recording.

    bad: bool scalar on the device, whether any loss so far was not finite.
    """

    def __init__(
        self,
        rates: list[Rate],
        training_loss: Callable[[], Tensor],
        settings: DescentSettings,
        record: bool,
    ) -> None:
        device = rates[0].parameters[0].device
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self._rates, self._loss = rates, training_loss
        self._record = record and device.type == "cuda"
        self._graph: Any = None
        self._taken = 0
        self._optimizer = self._adam(settings, device)

    @property
    def recorded(self) -> bool:
        """Whether the last step was a replay."""
        return self._graph is not None

    def step(self, factor: float) -> None:
        """One step at `factor` times every rate."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate.rate * factor)
            else:
                group["lr"] = rate.rate * factor
        if self._record and self._graph is None and self._taken == ORDINARY_STEPS:
            self._graph = self._recording()
        if self._graph is not None:
            self._graph.replay()
        elif self._record:
            self._on_side_stream()
        else:
            self._run()
        self._taken += 1

    def _run(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        self.bad |= ~torch.isfinite(loss.detach())
        self._optimizer.step()

    def _on_side_stream(self) -> None:
        """Steps before a recording run on a stream of their own, as recordings require."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream().wait_stream(side)

    def _recording(self) -> Any:
        """The recorded step, or None (and no further attempt) where it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        self._optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        except RuntimeError:
            self._record = False
            return None
        return graph

    def _adam(self, settings: DescentSettings, device: torch.device) -> torch.optim.Adam:
        """Adam whose epsilon is far below any gradient: losses differ by orders of magnitude."""
        groups = []
        for rate in self._rates:
            lr = torch.tensor(rate.rate, device=device) if self._record else rate.rate
            groups.append({"params": rate.parameters, "lr": lr})
        return torch.optim.Adam(
            groups,
            betas=settings.betas,
            eps=1e-15,
            fused=device.type == "cuda" or None,
            capturable=self._record,
        )


def _schedule(step: int, settings: DescentSettings) -> float:
    warm = min(1.0, step / settings.warmup) if settings.warmup else 1.0
    if not settings.cosine:
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / settings.steps))
