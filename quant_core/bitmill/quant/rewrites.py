"""Exact rewrites of a linear that stay with its quantized weight.

    y = W x = (W T^-1) (T x)        T invertible: a column order, scales of channels, a rotation
    y = W x = (W - S) x + S x       S what is kept beside the codes: outliers

`W` here is a linear's weight [N, K] and x its input, in the columns of the source. A weight is
quantized in the columns that its rewrites, one after the other, lead to (packed columns), and
`dequantize` leads back. What was found for one input (`transforms/`) is shared by all linears that
read it. Whether a stored format has a place for a rewrite, the format says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from bitmill.config.transforms import TRANSFORMS
from bitmill.errors import FormatError
from bitmill.registry import load_object
from bitmill.runtime.ranks import Ranks


class Rewrite(ABC):
    """One rewrite of one linear.

    name: of its transform in `config.transforms.TRANSFORMS`; stored: names of its tensors; settles:
    whether what is stored depends on what the solver made of the weight
    """

    name: ClassVar[str]
    stored: ClassVar[tuple[str, ...]]
    settles: ClassVar[bool] = False

    @abstractmethod
    def weights(self, W: Tensor) -> Tensor:
        """What is left to quantize of W [n, K]: W T^-1, or W - S."""

    @abstractmethod
    def undo(self, W: Tensor) -> Tensor:
        """The inverse of `weights`."""

    def settled(self, quantized: Tensor) -> Rewrite:
        """What is stored, once what `weights` gave is quantized as f32 [n, K]."""
        return self

    def shifted(self, shift: Tensor) -> Rewrite:
        """The same, where outputs are to move by what has the moments `shift` f32 [n, K] with the
        columns that it rewrites (`solvers/solver.py`, `Correction`)."""
        return self

    @abstractmethod
    def inputs(self, x: Tensor) -> Tensor:
        """T x for x [..., K]."""

    @abstractmethod
    def moments(self, sums: Tensor) -> Tensor:
        """sums T^T for sums [*, K] of products with x^T."""

    def hessian(self, H: Tensor) -> Tensor:
        """T H T^T for H [K, K]."""
        return self.moments(self.moments(H).T).T

    def outputs(self, x: Tensor, y: Tensor) -> Tensor:
        """y [..., N] of what was quantized, with S x added, for x [..., K] in source columns."""
        return y

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names in `stored`, which stand behind the linear's in files."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """From what `tensors` gave."""

    @abstractmethod
    def check(self, name: str, N: int, K: int) -> None:
        """Raise FormatError unless it fits the linear `name` of N rows and K columns."""

    def gathered(self, ranks: Ranks, count: int) -> Self:
        """For all `count` rows of a linear of which each rank rewrote its own."""
        return self

    def with_rows(self, rows: Tensor) -> Self:
        """For the linear whose row n is this one's row rows[n], i64 [N]."""
        return self


@dataclass(frozen=True, eq=False)
class ColumnOrder(Rewrite):
    """Packed column k is column order[k], i32 [K]. Kernels apply it while they read x."""

    order: Tensor
    name: ClassVar[str] = "order"
    stored: ClassVar[tuple[str, ...]] = ("order",)

    def weights(self, W: Tensor) -> Tensor:
        return W[:, self._index.to(W.device)]

    def undo(self, W: Tensor) -> Tensor:
        return W.index_select(1, self._places.to(W.device))

    def inputs(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self._index.to(x.device))

    def moments(self, sums: Tensor) -> Tensor:
        return sums[:, self._index.to(sums.device)]

    def hessian(self, H: Tensor) -> Tensor:
        index = self._index.to(H.device)
        return H[index][:, index]

    def tensors(self) -> dict[str, Tensor]:
        return {"order": self.order}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["order"])

    def check(self, name: str, N: int, K: int) -> None:
        check_order(self.order, K, f"{name}.order")

    @cached_property
    def _index(self) -> Tensor:
        return self.order.long()

    @cached_property
    def _places(self) -> Tensor:
        """The packed column of each column, i64 [K]."""
        return torch.argsort(self._index)


class Rewrites(tuple[Rewrite, ...]):
    """All rewrites of a linear, in the sequence in which its inputs go through them."""

    @classmethod
    def of_order(cls, order: Tensor | None) -> Rewrites:
        """A column order [K] alone, or none where it is None."""
        return cls() if order is None else cls([ColumnOrder(order.to(torch.int32))])

    @classmethod
    def read(cls, names: Iterable[str], tensor: Callable[[str], Tensor]) -> Rewrites:
        """Those of these names; `tensor` reads one by its name in `Rewrite.stored`."""
        kinds = [load_object(TRANSFORMS[name].rewrite) for name in names]
        return cls(kind.from_tensors({key: tensor(key) for key in kind.stored}) for kind in kinds)

    @property
    def order(self) -> Tensor | None:
        """The column order i32 [K] among them."""
        return next((one.order for one in self if isinstance(one, ColumnOrder)), None)

    def weights(self, W: Tensor) -> Tensor:
        """What is left to quantize of W [n, K], in packed columns."""
        for one in self:
            W = one.weights(W)
        return W

    def undo(self, W: Tensor) -> Tensor:
        """The inverse of `weights`."""
        for one in reversed(self):
            W = one.undo(W)
        return W

    def settled(self, quantized: Callable[[], Tensor]) -> Rewrites:
        """What is stored, once what `weights` gave is quantized as f32 [n, K]."""
        if not any(one.settles for one in self):
            return self
        W, found = quantized(), list[Rewrite]()
        for one in reversed(self):
            found.append(one.settled(W))
            W = found[-1].undo(W)
        return Rewrites(reversed(found))

    def shifted(self, shift: Tensor) -> Rewrites:
        """Where outputs are to move by what has the moments `shift` f32 [n, K] with x."""
        found = list[Rewrite]()
        for one in self:
            found.append(one.shifted(shift))
            shift = one.moments(shift)
        return Rewrites(found)

    def inputs(self, x: Tensor) -> Tensor:
        """What x [..., K] in the source's columns becomes."""
        for one in self:
            x = one.inputs(x)
        return x

    def moments(self, sums: Tensor) -> Tensor:
        """Sums [*, K] of products with x^T, of what x becomes."""
        for one in self:
            sums = one.moments(sums)
        return sums

    def hessian(self, H: Tensor) -> Tensor:
        """H [K, K] of what x becomes."""
        for one in self:
            H = one.hessian(H)
        return H

    def forward(self, x: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """y [..., N] of x [..., K] in the source's columns; `multiply` takes packed columns."""
        if not self:
            return multiply(x)
        first = self[0]
        return first.outputs(x, Rewrites(self[1:]).forward(first.inputs(x), multiply))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """What they store of the linear `prefix`, by name."""
        return {f"{prefix}.{key}": tensor for one in self for key, tensor in one.tensors().items()}

    def check(self, name: str, N: int, K: int) -> None:
        """Raise FormatError unless all fit the linear `name` of N rows and K columns."""
        for one in self:
            one.check(name, N, K)

    def gathered(self, ranks: Ranks, count: int) -> Rewrites:
        """For all `count` rows of a linear of which each rank rewrote its own."""
        return Rewrites(one.gathered(ranks, count) for one in self)

    def with_rows(self, rows: Tensor) -> Rewrites:
        """For the linear whose row n is this one's row rows[n], i64 [N]."""
        return Rewrites(one.with_rows(rows) for one in self)


NO_REWRITES = Rewrites()


def check_order(order: Tensor, K: int, name: str) -> None:
    """Raise FormatError unless `order` is an i32 permutation of 0..K-1."""
    if order.dtype != torch.int32 or tuple(order.shape) != (K,):
        raise FormatError(
            f"tensor {name} is {order.dtype} of shape {tuple(order.shape)}: "
            f"expected {torch.int32} of shape {(K,)}",
            param=name,
        )
    if not torch.equal(order.long().sort().values, torch.arange(K, device=order.device)):
        raise FormatError(f"tensor {name} is not a permutation of 0..{K - 1}", param=name)
