"""Triton's interpreter, put right where it departs from the compiler, and sped up."""

import os

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def bf16_products(monkeypatch):
    """The interpreter multiplies the bits of bf16 as integers."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(factor):
        if factor.dtype.scalar != tl.bfloat16:
            return factor
        bits = factor.data.view(np.uint16).astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, left, right, *rest):
        return plain(self, widened(left), widened(right), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(scope="session", autouse=True)
def quick_functions():
    """A kernel's start puts the interpreter in the place of `triton.language`, and every call of a
    function inside it does so again, which takes longer than the function. One call per module is
    enough: it also reaches what only that module imports."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    plain, known = InterpretedFunction.__call__, set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ in known:
            return self.rewrite()(*args, **kwargs)
        known.add(self.fn.__module__)
        return plain(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        yield
