"""All groups of all linears of one decoder block as the rows of one matrix.

    row(n, g) of a linear = first + n * G + g      holds the C <= 128 columns of group g, row n

Learning touches every weight of a block at every step. Kept as one matrix [R, 128] with a scale,
a zero point and a largest code per row, a step takes a dozen elementwise operations for the whole
block, whatever the widths of its groups: mixed widths cost nothing and no Python loop runs over
groups or linears. R is the sum of N * G over the linears; columns beyond a tail are zero and never
reach a linear. Given up: the memory of those columns (11% at K = 576).

A linear of the block is replaced by a `LearnableLinear` while it is learned, whose weight is an
ordinary tensor set before each forward pass, so that gradients flow into what made it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitmill.errors import ModelError, NumericalError
from bitmill.quant.grid import ONE_BIT_ZERO_STEPS
from bitmill.quant.rewrites import Rewrites
from bitmill.quant.tensors import QuantizedWeight
from bitmill_kernels.layout import GROUP_SIZE, group_columns, group_count


@dataclass(frozen=True, eq=False)
class LinearRows:
    """Where one linear [N, K] of G groups lies among the rows.

    order, inverse: i64 [K] on the device, or both None.
    """

    name: str
    N: int
    K: int
    widths: tuple[int, ...]
    first: int
    order: Tensor | None
    inverse: Tensor | None

    @property
    def groups(self) -> int:
        """Groups of columns, the tail included."""
        return len(self.widths)

    @property
    def rows(self) -> slice:
        """Its rows of the matrix."""
        return slice(self.first, self.first + self.N * self.groups)


class BlockRows:
    """The layout of a block's linears, taken from any quantized weights of theirs.

    largest:   f32 [R, 1] largest code 2^b - 1 of each row, 0 in a dropped group
    zero_step: f32 [R, 1] step of the storable zero points: 1, or 1/8 at width 1
    zero_top:  f32 [R, 1] largest storable zero point
    columns:   f32 [R, 1] columns in use
    valid:     bool [R, 128] columns in use, or None where all are
    """

    def __init__(self, weights: Mapping[str, QuantizedWeight], device: torch.device) -> None:
        self.device = device
        self.linears = tuple(_linear_rows(weights, device))
        self.total = sum(linear.N * linear.groups for linear in self.linears)
        widths = self._per_row([linear.widths for linear in self.linears])
        self.one_bit = widths == 1
        self.largest = torch.exp2(widths) - 1
        self.zero_step = torch.where(self.one_bit, 1 / ONE_BIT_ZERO_STEPS, 1.0)
        top_of_one = (2 * ONE_BIT_ZERO_STEPS - 1) / ONE_BIT_ZERO_STEPS
        self.zero_top = torch.where(self.one_bit, top_of_one, self.largest)
        self.columns = self._per_row([tuple(group_columns(lin.K)) for lin in self.linears])
        tails = any(linear.K % GROUP_SIZE for linear in self.linears)
        column = torch.arange(GROUP_SIZE, device=device)
        self.valid = column < self.columns if tails else None

    def of_weights(self, weights: Mapping[str, Tensor]) -> Tensor:
        """f32 [R, 128] from weights [N, K] in source column order."""
        parts = []
        for linear in self.linears:
            weight = weights[linear.name].to(self.device, torch.float32)
            parts.append(_rows(weight if linear.order is None else weight[:, linear.order]))
        return torch.cat(parts)

    def of_codes(self, weights: Mapping[str, QuantizedWeight]) -> Tensor:
        """u8 [R, 128] codes."""
        return torch.cat([_rows(weights[lin.name].codes.to(self.device)) for lin in self.linears])

    def of_grids(self, weights: Mapping[str, QuantizedWeight]) -> tuple[Tensor, Tensor]:
        """Scales and real zero points, each f32 [R, 1]."""
        scales = torch.cat([_column(weights[lin.name].scales) for lin in self.linears])
        zeros = torch.cat([_column(weights[lin.name].zeros) for lin in self.linears])
        return scales.to(self.device), zeros.to(self.device) * self.zero_step

    def dequantize(self, weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
        """Weights f32 [N, K] in source column order, as `QuantizedWeight.dequantize` gives them."""
        scale, zero = self.of_grids(weights)
        return self.to_weights(scale * (self.of_codes(weights).float() - zero))

    def to_weights(self, rows: Tensor) -> dict[str, Tensor]:
        """Weights [N, K] in source column order from [R, 128]; views where no order is set."""
        weights = {}
        parts = rows.split([linear.N * linear.groups for linear in self.linears])
        for linear, part in zip(self.linears, parts, strict=True):
            packed = part.view(linear.N, -1)[:, : linear.K]
            if linear.order is not None and linear.inverse is not None:
                packed = unordered(packed, linear.order, linear.inverse)
            weights[linear.name] = packed
        return weights

    def export(self, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, QuantizedWeight]:
        """Quantized weights on the CPU from codes [R, 128], scales and zero points [R, 1].

        Raises NumericalError where a scale does not fit fp16.
        """
        if not bool(torch.isfinite(scale.half()).all()):
            raise NumericalError(
                f"a learned scale of {float(scale.abs().max()):.4g} does not fit fp16: "
                "lower the learning rate",
                code="scale_overflow",
            )
        live = scale > 0
        codes = torch.where(live, codes, 0.0).to(torch.uint8).cpu()
        stored = torch.where(live, zero / self.zero_step, 0.0).round().to(torch.uint8).cpu()
        scales = scale.half().cpu()
        return {lin.name: _quantized(lin, codes, scales, stored) for lin in self.linears}

    def _per_row(self, values: list[tuple[int, ...]]) -> Tensor:
        """f32 [R, 1] from one value per group of each linear."""
        parts = [
            torch.tensor(groups, dtype=torch.float32).repeat(linear.N)
            for linear, groups in zip(self.linears, values, strict=True)
        ]
        return torch.cat(parts)[:, None].to(self.device)


class LearnableLinear(nn.Module):
    """y = x weight^T + bias, where `weight` [N, K] is set from outside before each forward."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        assert self.weight is not None
        return functional.linear(x, self.weight, self.bias)


@contextmanager
def learnable(
    block: nn.Module, linears: Mapping[str, nn.Module]
) -> Iterator[dict[str, LearnableLinear]]:
    """Replaces `linears` (full name -> module of `block`) by learnable ones, then puts them back.

    Raises ModelError for a linear that is not a module of its own inside the block.
    """
    slots, originals = attach(block, linears)
    try:
        yield slots
    finally:
        for path, module in originals.items():
            block.set_submodule(path, module)


def attach(
    block: nn.Module, linears: Mapping[str, nn.Module]
) -> tuple[dict[str, LearnableLinear], dict[str, nn.Module]]:
    """Replaces `linears` for good: the learnable ones by full name, the replaced ones by path."""
    paths = {id(module): path for path, module in block.named_modules()}
    slots, originals = {}, {}
    for name, module in linears.items():
        path = paths.get(id(module))
        if not path:
            raise ModelError(
                f"linear {name} is not a module of its own, so it cannot be learned: "
                "use refinement method 'gptq' for this model",
                code="not_learnable",
                param=name,
            )
        bias = getattr(module, "bias", None)
        slots[name] = LearnableLinear(bias)
        originals[path] = module
        block.set_submodule(path, slots[name])
    return slots, originals


class _Unorder(torch.autograd.Function):
    """Columns from packed to source order; both directions are plain gathers."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return weight.index_select(1, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(1, order), None, None


def unordered(weight: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """weight [N, K] from packed to source column order; order and its inverse i64 [K]."""
    result: Tensor = _Unorder.apply(weight, order, inverse)
    return result


def _linear_rows(
    weights: Mapping[str, QuantizedWeight], device: torch.device
) -> Iterator[LinearRows]:
    first = 0
    for name, weight in weights.items():
        order = None if weight.order is None else weight.order.long().to(device)
        inverse = None if order is None else torch.argsort(order)
        yield LinearRows(name, weight.N, weight.K, weight.widths, first, order, inverse)
        first += weight.N * len(weight.widths)


def _rows(matrix: Tensor) -> Tensor:
    """[N * G, 128] from [N, K], the tail filled up with zeros."""
    padding = group_count(matrix.shape[1]) * GROUP_SIZE - matrix.shape[1]
    return functional.pad(matrix, (0, padding)).reshape(-1, GROUP_SIZE)


def _column(grid: Tensor) -> Tensor:
    """f32 [N * G, 1] from [G, N]."""
    return grid.t().reshape(-1, 1).float()


def _quantized(linear: LinearRows, codes: Tensor, scales: Tensor, zeros: Tensor) -> QuantizedWeight:
    shape = (linear.N, linear.groups)
    return QuantizedWeight(
        codes[linear.rows].reshape(linear.N, -1)[:, : linear.K].contiguous(),
        scales[linear.rows].reshape(shape).t().contiguous(),
        zeros[linear.rows].reshape(shape).t().contiguous(),
        linear.widths,
        Rewrites.of_order(None if linear.order is None else linear.order.cpu()),
    )
