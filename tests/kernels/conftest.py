"""Triton's interpreter, put right where it departs from the compiler."""

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
