"""Tensors that stand for packed weights: they can be read, and a write is an error.

Libraries change a linear by writing to its `weight` (`weight.data += delta`, as adapters are
merged). A packed linear's weight is made anew from its codes at each access, so such a write would
be lost without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitmill.errors import InputError

_HARMLESS = frozenset({"requires_grad_", "detach_", "share_memory_"})
_DATA: Any = Tensor.data
_READ_DATA, _WRITE_DATA = _DATA.__get__, _DATA.__set__


class ReadOnlyTensor(Tensor):
    """A tensor whose values cannot be changed; results of operations on it are plain tensors."""

    _is_hf_initialized: bool

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Raises InputError where `func` would write into a tensor of this class."""
        kwargs = kwargs or {}
        operands = (*args, *kwargs.values())
        if isinstance(kwargs.get("out", operands[0] if _writes(func) else None), cls):
            raise InputError(
                "a packed weight cannot be written to: its codes stand for the values. Keep the "
                "adapter beside it, or change a dequantized copy (`model.dequantize()`)",
                code="packed_weight",
                param="weight",
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if func == _READ_DATA:
            return result.as_subclass(cls)
        return result


def _writes(func: Callable[..., Any]) -> bool:
    """Whether an operation of torch changes its first argument."""
    name = getattr(func, "__name__", "")
    if func == _WRITE_DATA or name == "__setitem__":
        return True
    in_place = name.endswith("_") and not name.endswith("__")
    return (in_place and name not in _HARMLESS) or name in _AUGMENTED


_AUGMENTED = frozenset(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "mod"))
