"""Whether fp16 holds the scales that a linear's weights ask for, told before anything is computed.

A group's scale is about r / (2^b - 1), r = max(w, 0) - min(w, 0) of its columns in one row. Which
columns share a group and which width b they get is not known yet, so whole rows are judged: a row
is too large where its scale at the smallest legal width lies beyond fp16, and lost where its scale
at the largest legal width rounds to 0. Between 0 and fp16's normal range scales keep few digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitmill.config.bit_width_map import DROPPED
from bitmill.errors import ModelError
from bitmill.plan.model_plan import PlannedLinear

_FP16 = torch.finfo(torch.float16)
_SMALLEST = 2.0**-24
"""Smallest positive value of fp16; half of it rounds to 0."""


@dataclass
class ScaleRange:
    """Looks at the weights of all planned linears, one after the other.

    widths: that the job may choose and that have codes, ascending. linears: by the stored tensor
    that holds them.
    """

    linears: dict[str, PlannedLinear]
    widths: Sequence[int]
    _lost: dict[str, int] = field(default_factory=dict)
    _coarse: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, linears: Iterable[PlannedLinear], widths: Sequence[int]) -> ScaleRange:
        """A stored tensor that holds several linears is told by its first."""
        by_tensor: dict[str, PlannedLinear] = {}
        for linear in linears:
            by_tensor.setdefault(linear.source.tensor, linear)
        return cls(by_tensor, [width for width in widths if width != DROPPED])

    def look(self, name: str, tensor: Tensor) -> None:
        """Take in a stored tensor, finite, of two or three dimensions; others count nothing.

        Raises `ModelError` (code `scale_overflow`) where fp16 cannot hold a scale.
        """
        linear = self.linears.get(name)
        if linear is None:
            return
        rows = tensor.T if linear.source.transposed else tensor.flatten(0, -2)
        low, high = torch.aminmax(rows, dim=1)
        span = high.double().clamp(min=0) - low.double().clamp(max=0)
        coarsest = float(span.max()) / self._steps(self.widths[0])
        if coarsest > _FP16.max:
            raise ModelError(
                f"{linear.name} has weights up to {float(rows.abs().max()):.3g}: at "
                f"{self.widths[0]} bits their scale is {coarsest:.3g}, fp16 holds {_FP16.max:g}; "
                "keep this linear (allocation.keep), raise allocation.min_bits, or check the "
                "source",
                code="scale_overflow",
                param=linear.name,
            )
        finest = span / self._steps(self.widths[-1])
        lost = int(((finest > 0) & (finest <= _SMALLEST / 2)).sum())
        if lost:
            self._lost[linear.name] = lost
        elif 0 < float(finest.max()) < _FP16.smallest_normal:
            self._coarse.append(linear.name)

    @staticmethod
    def _steps(width: int) -> int:
        return (1 << width) - 1

    def notes(self) -> list[str]:
        """What to say of weights that are too small, one sentence for each kind."""
        told = []
        if self._lost:
            first = next(iter(self._lost))
            told.append(
                f"weights in {sum(self._lost.values())} rows of {len(self._lost)} linears are too "
                f"small for scales in fp16 ({_SMALLEST:.1e} or more) and become 0, first "
                f"{self._lost[first]} rows of {first}: keep these linears (allocation.keep) if "
                "they matter"
            )
        if self._coarse:
            told.append(
                f"all scales of {len(self._coarse)} linears lie below fp16's normal range "
                f"({_FP16.smallest_normal:.1e}), where they keep fewer digits, first "
                f"{self._coarse[0]}"
            )
        return told
