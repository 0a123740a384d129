#!/usr/bin/env bash
# Triton 3.6.0: the interpreter cuts float32 to bfloat16 towards zero, the compiler rounds to nearest.
#
# `x.to(tl.bfloat16)` compiles to `cvt.rn.bf16`, for a GPU of compute capability 9.0 as here and for
# others, and torch rounds to nearest, too. Under TRITON_INTERPRET=1 the lower 16 bits are dropped: every
# value loses up to a whole unit in the last place instead of half of one, always towards zero, so that
# sums of bfloat16 values come out too small. float16 is rounded to nearest by both. Tests of bfloat16
# kernels in the interpreter need twice the tolerance, or float16. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install torch==2.13.0 numpy
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install --no-deps triton==3.6.0
cat > "$work/cast.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget


@triton.jit
def cast(source, target, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


if sys.argv[1] == "compiled":
    signature = {"source": "*fp32", "target": "*bf16", "COUNT": "constexpr"}
    made = triton.compile(
        triton.compiler.ASTSource(cast, signature, {"COUNT": 1024}), target=GPUTarget("cuda", 90, 32)
    )
    used = {word.rstrip(";") for word in made.asm["ptx"].split() if word.startswith("cvt.")}
    print(f"triton {triton.__version__}, compiled for compute capability 9.0: {used}")
    assert used and all(one.startswith("cvt.rn.bf16") for one in used), "another rounding is compiled"
else:
    torch.manual_seed(0)
    x = torch.rand(1024) + 1
    for dtype, cut in ((torch.bfloat16, True), (torch.float16, False)):
        y = torch.empty_like(x, dtype=dtype)
        cast[(1,)](x, y, COUNT=1024)
        larger, smaller = (y.float() > x).sum().item(), (y.float() < x).sum().item()
        equal = torch.equal(y, x.to(dtype))
        print(f"interpreted, {dtype}: {larger} of 1024 above their float32, {smaller} below; as torch: {equal}")
        assert (larger == 0 and not equal) if cut else equal, "the interpreter rounds otherwise now"
PY
TRITON_CACHE_DIR="$work/cache" "$work/venv/bin/python" "$work/cast.py" compiled
TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/cast.py" interpreted
