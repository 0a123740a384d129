"""EXL3's own CUDA kernels of one linear, without its package and without torch's extensions.

    PYTHONPATH=WHEEL python benchmarks/exl3_kernels.py LIBRARY.so

compiles what multiplies, reconstructs and rotates in the wheel's sources for `RATES` and the
codebook that its converter takes by default (mul1), with `exl3_kernels.cu`. WHEEL is a folder that
exllamav3-1.6.5-py3-none-any.whl was unzipped into. BITMILL_EXL3_LIBRARY names such a library;
without, a process compiles one (`peer_library.py`).

    y = (((x * suh) R) W) R * svh,    R blocks of a Hadamard matrix of 128 over sqrt(128)

with W [K, N] as the trellis codes have it. As `LinearEXL3` does, `Matrix` multiplies packed codes
for up to 144 tokens, rotating x and y in the same launch; for more it writes W out and calls
cuBLAS, from 1,024 tokens on W with both rotations in it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import peer_library
import torch
from peer_library import check, stream
from torch import Tensor

RATES = (2, 3, 4)
SOURCES = (
    *(f"comp_units/exl3_comp_unit_{rate}_cb2.cu" for rate in RATES),
    *("exl3_gemv.cu", "exl3_devctx.cu", "exl3_kernel_map.cu", "coop_autotune.cu"),
    *("hadamard.cu", "reconstruct.cu"),
)
FLAGS = ("--use_fast_math", "-diag-suppress=177,20012")
BLOCK = 128
PACKED_TOKENS, ROTATED_TOKENS = 144, 1024
"""The most that are multiplied from packed codes, the fewest by a W with the rotations in it."""
MOST_ROWS = 32768
"""Beyond these exllamav3 writes W out in parts, which `Matrix` does not."""


def build(library: Path) -> Path:
    """Compile; raises RuntimeError with what nvcc said."""
    package = peer_library.folder_of("exllamav3", "unzip its wheel and put it there")
    sources = package / "exllamav3_ext"
    own = Path(__file__).with_suffix(".cu")
    flags = [*FLAGS, f"-I{sources}", f'-DEXLLAMAV3_VERSION="{version("exllamav3")}"']
    return peer_library.compiled(
        library,
        [own, *(sources / "quant" / name for name in SOURCES)],
        peer_library.STAND_IN,
        flags,
    )


@cache
def load() -> ctypes.CDLL:
    """The library, which times its launches anew; raises RuntimeError or OSError."""
    os.environ.setdefault("EXLLAMAV3_TUNE_CACHE", tempfile.mkdtemp())
    library = peer_library.loaded("BITMILL_EXL3_LIBRARY", build)
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.exl3_product.argtypes = [pointer] * 6 + [integer] * 4 + [pointer]
    library.exl3_reconstruct.argtypes = [pointer] * 4 + [integer] * 3 + [pointer]
    library.exl3_rotate.argtypes = [pointer] * 4 + [integer] * 2 + [pointer]
    names = ("version", "product", "reconstruct", "rotate")
    for function in (getattr(library, f"exl3_{name}") for name in names):
        function.restype = ctypes.c_char_p
    return library


class Matrix:
    """One linear [N, K] in EXL3's kernels, on the GPU of its tensors."""

    def __init__(self, stored: Mapping[str, Tensor], scratch: Tensor) -> None:
        """stored: trellis i16 [K / 16, N / 16, 16 * rate], suh f16 [K], svh f16 [N], which it
        copies. scratch: f16, K * N of it, for W; matrices may share it."""
        self._library = load()
        names = ("trellis", "suh", "svh")
        self._trellis, self._suh, self._svh = (stored[name].clone() for name in names)
        self.K, self.N, self.rate = len(self._suh), len(self._svh), self._trellis.shape[2] // 16
        expected = (self.K // 16, self.N // 16, 16 * self.rate)
        if self._trellis.shape != expected or self.rate not in RATES or self.N > MOST_ROWS:
            raise ValueError(
                f"a trellis {tuple(self._trellis.shape)} of {self.N} x {self.K} weights; rates "
                f"{RATES} and at most {MOST_ROWS} rows are expected"
            )
        if scratch.dtype != torch.float16 or scratch.numel() < self.K * self.N:
            raise ValueError(f"scratch has {scratch.numel()} of {self.K * self.N} halves")
        self._scratch = scratch[: self.K * self.N].view(self.K, self.N)
        self.nbytes = sum(tensor.nbytes for tensor in (self._trellis, self._suh, self._svh))

    def product(self, x: Tensor) -> Tensor:
        """f16 [T, N] of f16 [T, K], by the way that exllamav3 goes for so many tokens."""
        if x.dtype != torch.float16 or x.shape[1:] != (self.K,) or not x.is_contiguous():
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, not f16 [T, {self.K}] in one piece")
        y = torch.empty(len(x), self.N, dtype=torch.half, device=x.device)
        inner = torch.empty_like(x) if len(x) < ROTATED_TOKENS else x
        if len(x) <= PACKED_TOKENS:
            tensors = (x, self._trellis, self._suh, self._svh, inner, y)
            sizes = (len(x), self.K, self.N, self.rate)
            check(
                self._library.exl3_product(*(one.data_ptr() for one in tensors), *sizes, stream())
            )
            return y
        if len(x) >= ROTATED_TOKENS:
            return torch.mm(x, self._reconstruct(rotated=True), out=y)
        self._rotate(x, self._suh, None, inner)
        torch.mm(inner, self._reconstruct(rotated=False), out=y)
        self._rotate(y, None, self._svh, y)
        return y

    def weight(self) -> Tensor:
        """f32 [N, K]: W as the reconstruction kernel has it, rotated and scaled in torch."""
        W = self._reconstruct(rotated=False).float()
        return in_original_basis(W, self._suh.float(), self._svh.float()).t()

    def _reconstruct(self, *, rotated: bool) -> Tensor:
        scales = (self._suh.data_ptr(), self._svh.data_ptr()) if rotated else (None, None)
        out, stored = self._scratch.data_ptr(), self._trellis.data_ptr()
        sizes = (self.K, self.N, self.rate)
        check(self._library.exl3_reconstruct(out, stored, *scales, *sizes, stream()))
        return self._scratch

    def _rotate(self, x: Tensor, before: Tensor | None, after: Tensor | None, y: Tensor) -> None:
        scales = (None if one is None else one.data_ptr() for one in (before, after))
        check(self._library.exl3_rotate(x.data_ptr(), *scales, y.data_ptr(), *x.shape, stream()))


def in_original_basis(W: Tensor, suh: Tensor, svh: Tensor) -> Tensor:
    """diag(suh) R W R diag(svh) [K, N] of W [K, N]."""
    hadamard = torch.ones(1, 1, device=W.device)
    while len(hadamard) < BLOCK:
        top = torch.cat([hadamard, hadamard], 1)
        hadamard = torch.cat([top, torch.cat([hadamard, -hadamard], 1)])
    R: Tensor = hadamard / BLOCK**0.5
    K, N = W.shape
    left = (R @ W.view(K // BLOCK, BLOCK, N)).view(K, N // BLOCK, BLOCK)
    return suh[:, None] * (left @ R).view(K, N) * svh


def random_linear(N: int, K: int, rate: int, device: torch.device) -> dict[str, Tensor]:
    """Tensors of a linear of random codes: every bit is legal."""
    shape = (K // 16, N // 16, 16 * rate)
    signs = [torch.randint(0, 2, (size,), device=device) * 2 - 1 for size in (K, N)]
    return {
        "trellis": torch.randint(-(1 << 15), 1 << 15, shape, device=device).short(),
        "suh": signs[0].half(),
        "svh": (signs[1] * (torch.rand(N, device=device) * 0.01 + 0.005)).half(),
    }


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
