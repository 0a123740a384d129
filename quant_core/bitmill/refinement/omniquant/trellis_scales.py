"""Scales of a block in trellis codes, learned; the circles stay as they are.

    w'[n, k] = r[n] row_ratio[n] * s[g] group_ratio[g] * value[n, k]

r and s are the scales at the start, value what the circles decode to. Both products pass through
fp16 inside the loss, so what is stored is what was learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from bitmill.quant.rewrites import ColumnOrder
from bitmill.quant.trellis import TrellisTensor
from bitmill.refinement.omniquant.rounding import SMALLEST_RATIO, straight_half
from bitmill.refinement.omniquant.rows import unordered
from bitmill_kernels.layout import GROUP_SIZE


class TrellisScales(nn.Module):
    """A `Tunable` of one block's linears: ratios f32 of all row scales and of all group scales.

    Values are kept as f16 [N, K] on `device`.
    """

    def __init__(self, starts: Mapping[str, TrellisTensor], device: torch.device) -> None:
        super().__init__()
        self._starts = dict(starts)
        self._values = {name: _values(start, device) for name, start in starts.items()}
        self._orders = {name: _order(start, device) for name, start in starts.items()}
        self._rows = torch.cat([start.row_scales for start in starts.values()]).to(device).float()
        groups = [start.group_scales for start in starts.values()]
        self._groups = torch.cat(groups).to(device).float()
        self.row_ratio = nn.Parameter(torch.ones_like(self._rows))
        self.group_ratio = nn.Parameter(torch.ones_like(self._groups))

    @property
    def ratios(self) -> list[nn.Parameter]:
        """What is learned."""
        return [self.row_ratio, self.group_ratio]

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Weights [N, K] in the source's columns, computed in f32 and cast once."""
        found = {}
        for name, rows, groups in self._scales():
            values = self._values[name].float()
            columns = groups[:, None].expand(-1, GROUP_SIZE).flatten()[: values.shape[1]]
            packed = values * columns * rows[:, None]
            for one in reversed(self._starts[name].rewrites):
                if not isinstance(one, ColumnOrder):
                    packed = one.undo(packed)
                elif (order := self._orders[name]) is not None:
                    packed = unordered(packed, *order)
            found[name] = packed.to(dtype)
        return found

    @torch.no_grad()
    def export(self) -> dict[str, TrellisTensor]:
        """What would be stored now, on the CPU."""
        return {
            name: replace(
                self._starts[name], row_scales=rows.half().cpu(), group_scales=groups.half().cpu()
            )
            for name, rows, groups in self._scales()
        }

    def _scales(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Row scales [N] and group scales [G] of every linear, exact in fp16, differentiable."""
        starts = self._starts.values()
        rows = _scaled(self._rows, self.row_ratio).split([start.N for start in starts])
        groups = _scaled(self._groups, self.group_ratio).split([len(s.widths) for s in starts])
        yield from zip(self._starts, rows, groups, strict=True)


def _scaled(scales: Tensor, ratio: Tensor) -> Tensor:
    return straight_half(scales * ratio.clamp(min=SMALLEST_RATIO))


def _values(start: TrellisTensor, device: torch.device) -> Tensor:
    """f16 [N, K] in packed columns, exact: what the circles decode to."""
    unscaled = replace(
        start,
        row_scales=torch.ones_like(start.row_scales),
        group_scales=torch.ones_like(start.group_scales),
    )
    return unscaled.packed_values().half().to(device)


def _order(start: TrellisTensor, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """The column order and its inverse, i64 [K]."""
    if start.order is None:
        return None
    order = start.order.long().to(device)
    return order, torch.argsort(order)
