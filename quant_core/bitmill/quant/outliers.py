"""Outlier columns of a linear, kept in 16 bits beside its codes; what finds them is
`transforms/outliers.py`.

    y = Q x + S x_O          O: the outlier columns, S f16 [N, k] their values, Q the codes' weight

S is the best that can stand beside any Q, (W - Q) P with P = H_O H_OO^-1, so the error of the other
columns goes into the outliers as well. What a solver has to make small is then the error on
x - P x_O, the part of the inputs that outliers do not tell:

    tr((W - Q - S) H (W - Q - S)^T) = tr((W - Q) H' (W - Q)^T)       H' = H - H_O H_OO^-1 H_O^T

The codes of outlier columns are found as those of columns that are 0 and that no input excites;
whatever they became, S makes up for it.

Where the output has to move too, for what the quantized prefix has lost (d = y' - y, moments
C = d x^T), the solver answers for the part that x - P x_O tells, and S for the rest: it gains
C_O H_OO^-1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from bitmill.errors import FormatError
from bitmill.quant.rewrites import Rewrite, Rewrites
from bitmill.runtime.ranks import Ranks


@dataclass(frozen=True, eq=False)
class Fitted(Rewrite):
    """Outlier columns i64 [k] of a linear W f32 [n, K] that is not solved yet, P f32 [K, k] and
    H_OO^-1 f32 [k, k]. moved: C_O H_OO^-1 f32 [n, k]."""

    columns: Tensor
    shares: Tensor
    inverse: Tensor
    W: Tensor
    moved: Tensor | None = None
    name: ClassVar[str] = "outliers"
    stored: ClassVar[tuple[str, ...]] = ("outlier_columns", "outliers")
    settles: ClassVar[bool] = True

    def weights(self, W: Tensor) -> Tensor:
        return W.index_fill(1, self.columns.to(W.device), 0.0)

    def undo(self, W: Tensor) -> Tensor:
        return self.settled(W).undo(W)

    def settled(self, quantized: Tensor) -> Outliers:
        columns = self.columns.to(quantized.device)
        values = (self.W.to(quantized) - quantized) @ self.shares.to(quantized)
        if self.moved is not None:
            values = values + self.moved.to(quantized)
        return Outliers(columns.int(), values.half())

    def shifted(self, shift: Tensor) -> Self:
        own = shift[:, self.columns.to(shift.device)]
        return replace(self, moved=own @ self.inverse.to(shift))

    def inputs(self, x: Tensor) -> Tensor:
        return x

    def moments(self, sums: Tensor) -> Tensor:
        return sums - sums[:, self.columns.to(sums.device)] @ self.shares.to(sums).T

    def tensors(self) -> dict[str, Tensor]:
        raise ValueError("outliers are stored once their linear is solved: see `settled`")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        raise ValueError("what is read has been solved: see `Outliers`")

    def check(self, name: str, N: int, K: int) -> None:
        pass

    def with_rows(self, rows: Tensor) -> Self:
        moved = None if self.moved is None else self.moved[rows]
        return replace(self, W=self.W[rows], moved=moved)


@dataclass(frozen=True, eq=False)
class Outliers(Rewrite):
    """What is stored: packed columns i32 [k] and their values f16 [N, k]."""

    columns: Tensor
    values: Tensor
    name: ClassVar[str] = "outliers"
    stored: ClassVar[tuple[str, ...]] = Fitted.stored

    def weights(self, W: Tensor) -> Tensor:
        return W.index_add(1, self.columns.to(W.device), self.values.to(W), alpha=-1)

    def undo(self, W: Tensor) -> Tensor:
        return W.index_add(1, self.columns.to(W.device), self.values.to(W))

    def inputs(self, x: Tensor) -> Tensor:
        return x

    def moments(self, sums: Tensor) -> Tensor:
        return sums

    def outputs(self, x: Tensor, y: Tensor) -> Tensor:
        return y + x.index_select(-1, self.columns.to(x.device)) @ self.values.to(x).T

    def tensors(self) -> dict[str, Tensor]:
        return {"outlier_columns": self.columns, "outliers": self.values}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["outlier_columns"], tensors["outliers"])

    def check(self, name: str, N: int, K: int) -> None:
        columns, values = self.columns, self.values
        count = columns.numel()
        for key, tensor, dtype, shape in (
            ("outlier_columns", columns, torch.int32, (count,)),
            ("outliers", values, torch.float16, (N, count)),
        ):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise FormatError(
                    f"tensor {name}.{key} is {tensor.dtype} of shape {tuple(tensor.shape)}: "
                    f"expected {dtype} of shape {shape}",
                    param=f"{name}.{key}",
                )
        places = columns.tolist()
        if len(set(places)) != count or min(places, default=0) < 0 or max(places, default=0) >= K:
            raise FormatError(
                f"tensor {name}.outlier_columns names a column twice, or one that is not of 0 to "
                f"{K - 1}",
                param=f"{name}.outlier_columns",
            )
        if not bool(torch.isfinite(values).all()):
            raise FormatError(
                f"tensor {name}.outliers has values that are not finite", param=f"{name}.outliers"
            )

    def gathered(self, ranks: Ranks, count: int) -> Self:
        return replace(self, values=ranks.gather_rows(self.values.contiguous(), count))

    def with_rows(self, rows: Tensor) -> Self:
        return replace(self, values=self.values[rows.to(self.values.device)])


def outlier_inputs(rewrites: Rewrites) -> Tensor:
    """The outlier columns i64 [k] of a linear, as columns of the source."""
    found = [one.columns.long() for one in rewrites if isinstance(one, Outliers)]
    packed = torch.cat([torch.empty(0, dtype=torch.int64), *found])
    order = rewrites.order
    return packed if order is None else order.long()[packed]
