"""Packed linears that read the same input, multiplied in one launch.

q/k/v and gate/up are separate modules that a model calls one after the other with the same
tensor. The first call multiplies for all of them and keeps the outputs; each of the others takes
its own. Outputs are kept only until every sibling has come for its part, and a call with another
tensor starts anew, so a sibling that is called alone costs time and is still right.

Only accelerators gain from it: small launches are what they are slow at.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitmill.plan.architectures import sibling_key
from bitmill_kernels.matmul.linear import MixedLinear

if TYPE_CHECKING:
    from bitmill.inference.linear import QuantizedLinear


class SiblingGroup:
    """Modules that share an input; the stack is built at the first use and dropped by `reset`."""

    def __init__(self, modules: list[QuantizedLinear]) -> None:
        self.modules = modules
        self.reset()

    def reset(self) -> None:
        """Forget the stack: a module has moved or changed."""
        self._stack: MixedLinear | None = None
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def output(self, module: QuantizedLinear, x: Tensor) -> Tensor:
        """y [..., N] of one of the modules, without its bias."""
        index = next(i for i, sibling in enumerate(self.modules) if sibling is module)
        y = self._outputs[index] if self._input is x else None
        if y is None:
            if self._stack is None or self._stack.device != x.device:
                self._stack = self._build(x.device)
            outputs = self._stack(x).split(self._stack.outputs, dim=-1)
            self._input, self._outputs = x, list(outputs)
            y = outputs[index]
        self._outputs[index] = None  # a second call with the same tensor multiplies again
        if all(output is None for output in self._outputs):
            self._input = None
        return y

    def _build(self, device: torch.device) -> MixedLinear:
        stack = MixedLinear([module.packed_weight() for module in self.modules], device)
        for module in self.modules:
            module.release()
        return stack

    def __getstate__(self) -> dict[str, Any]:
        return {"modules": self.modules, "_stack": None, "_input": None, "_outputs": []}


def join_siblings(modules: Iterable[tuple[str, QuantizedLinear]]) -> None:
    """Put modules, given by full name, that read the same input into groups."""
    groups: dict[tuple[Any, ...], list[QuantizedLinear]] = {}
    for name, module in modules:
        order = None if module.order is None else module.order.data_ptr()
        groups.setdefault((*sibling_key(name), module.in_features, order), []).append(module)
    for members in groups.values():
        if len(members) > 1:
            group = SiblingGroup(members)
            for member in members:
                member.siblings = group
