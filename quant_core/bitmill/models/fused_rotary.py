"""Rotary position embeddings of a block as one kernel, where weights are half precision.

transformers turns queries and keys by ten kernels, most of which read and write all of one of them.
`bitmill_kernels.rotary.rotary` does it in one, and rounds once instead of three times.

Attention is found by its code: a forward pass that calls `apply_rotary_pos_emb` of its own file,
where that function agrees with `rotate` on random inputs. Such a module becomes an instance of a
subclass whose forward pass is the same code with another function of that name, so copies of it
and forward passes set on it behave as before. Where the function does something else (pairs of
neighbouring columns, as in GLM), or is out of reach behind a decorator, the module stays as it is.
"""

from __future__ import annotations

from functools import cache, update_wrapper
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitmill_kernels.rotary.rotary import fits, rotate

NAME = "apply_rotary_pos_emb"
TOLERANCE = 0.01
HEAD_DIM = 64


@torch.no_grad()
def fuse_rotary(block: nn.Module) -> list[str]:
    """Turns queries and keys of the block's attention in one kernel; returns the modules' paths."""
    fused = []
    for path, module in block.named_modules():
        weight = next((p for p in module.parameters() if p.is_floating_point()), None)
        if weight is None or "forward" in vars(module):
            continue
        kind: Any = type(module)
        faster = _subclass(kind, weight.device, weight.dtype)
        if faster is not None:
            module.__class__ = faster
            fused.append(path)
    return fused


class _Rotary(NamedTuple):
    """Stands for `original` in a forward pass; calls it for what `rotate` was not seen to do.

    partial: whether columns without an angle pass through.
    """

    original: Any
    partial: bool

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        alike = q.dtype == k.dtype == cos.dtype == sin.dtype
        if args or kwargs or not alike or not fits(q, k, cos, sin):
            return self.original(q, k, cos, sin, *args, **kwargs)
        if cos.shape[-1] < q.shape[-1] and not self.partial:
            return self.original(q, k, cos, sin)
        return rotate(q, k, cos, sin)


@cache
def _subclass(
    kind: type[nn.Module], device: torch.device, dtype: torch.dtype
) -> type[nn.Module] | None:
    """The class `kind` with rotations in one kernel; None where it calls no such function."""
    forward = kind.forward
    if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
        return None
    original = forward.__globals__.get(NAME)
    if isinstance(original, _Rotary) or not _agrees(original, HEAD_DIM, device, dtype):
        return None
    rotary = _Rotary(original, _agrees(original, HEAD_DIM // 2, device, dtype))
    names = forward.__globals__ | {NAME: rotary}
    code, defaults, cells = forward.__code__, forward.__defaults__, forward.__closure__
    fused = FunctionType(code, names, forward.__name__, defaults, cells)
    fused.__kwdefaults__ = forward.__kwdefaults__
    update_wrapper(fused, forward)
    members = {"forward": fused, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), members)


def _agrees(original: Any, turned: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a function does what `rotate` does to heads of which it turns so many columns."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    q, k = draw(2, 8, 3, HEAD_DIM), draw(2, 4, 3, HEAD_DIM)
    cos, sin = draw(2, 3, turned), draw(2, 3, turned)
    try:
        expected = original(q, k, cos, sin)
    except Exception:  # noqa: BLE001  (a function of that name may want anything)
        return False
    if not isinstance(expected, tuple) or len(expected) != 2:
        return False
    return all(map(_is_close, rotate(q, k, cos, sin), expected))


def _is_close(found: Tensor, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or expected.dtype != found.dtype:
        return False
    if expected.shape != found.shape:
        return False
    missed = (found.float() - expected.float()).norm()
    return bool(missed <= TOLERANCE * expected.float().norm())
