"""ExLlamaV2's own CUDA kernels of one linear, without its package and without torch's extensions.

    PYTHONPATH=WHEEL python benchmarks/exl2_kernels.py LIBRARY.so

compiles what multiplies and reconstructs in the wheel's sources, with `exl2_kernels.cu`: half a
minute on two cores. WHEEL is a folder that exllamav2-0.3.2-py3-none-any.whl was unzipped into.
BITMILL_EXL2_LIBRARY names such a library; without, a process compiles one (`peer_library.py`).
`HEADERS` stand for the two of torch that the sources include; of cuBLAS they call one function,
which is taken from the library that torch has loaded.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import peer_library
import torch
from peer_library import stream
from torch import Tensor

GROUP = 128
SOURCES = (
    "comp_units/unit_exl2_1a.cu",
    "comp_units/unit_exl2_1b.cu",
    "q_matrix.cu",
    "graph.cu",
    "h_add.cu",
)
HEADERS = {
    "ATen/Tensor.h": "namespace at { class Tensor; }",
    "ATen/cuda/CUDAContext.h": """#pragma once
#include <algorithm>
#include <map>
#include <tuple>
#include <vector>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
typedef struct cublasContext* cublasHandle_t;
enum cublasOperation_t { CUBLAS_OP_N };
extern "C" int cublasHgemm(
    cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const half*, const half*,
    int, const half*, int, const half*, half*, int);
// torch's handle has the stream already, and a workspace that setting it again would take away.
inline void cublasSetStream(cublasHandle_t, cudaStream_t) {}
""",
}
DTYPES = {
    "weight": torch.int32,
    "groups": torch.int16,
    "scale": torch.int32,
    "scale_max": torch.float16,
    "invperm": torch.int32,
}
"""Of a linear's tensors in a file, by their names behind `q_`."""
MOST_DEQUANTIZED = 512 << 20
"""Weights that exllamav2 writes out at once, as its configuration has it."""
TUNED_TOKENS, TUNING_CALLS = 4, 201
"""Up to so many tokens it tries two sizes of blocks, and keeps the faster after so many calls."""


def build(library: Path) -> Path:
    """Compile; raises RuntimeError with what nvcc said."""
    package = peer_library.folder_of("exllamav2", "unzip its wheel and put it there")
    sources = package / "exllamav2_ext" / "cuda"
    own = Path(__file__).with_suffix(".cu")
    flags = [f"-I{sources}", f'-DEXLLAMAV2_VERSION="{version("exllamav2")}"']
    return peer_library.compiled(
        library, [*(sources / name for name in SOURCES), own], HEADERS, flags
    )


@cache
def load() -> ctypes.CDLL:
    """The library; raises RuntimeError or OSError."""
    cuda = (torch.version.cuda or "").partition(".")[0]
    ctypes.CDLL(f"libcublas.so.{cuda}", ctypes.RTLD_GLOBAL)
    library = peer_library.loaded("BITMILL_EXL2_LIBRARY", build)
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.exl2_version.restype = ctypes.c_char_p
    library.exl2_make.argtypes = [integer] * 4 + [pointer] * 7 + [integer, pointer]
    library.exl2_make.restype = pointer
    library.exl2_free.argtypes = [pointer]
    library.exl2_reconstruct.argtypes = [pointer] * 3
    library.exl2_product.argtypes = [pointer] * 3 + [integer, pointer, pointer]
    return library


def arguments(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What exllamav2's loader gives its extension, of a linear's tensors (`DTYPES`): copies.

    weight i32 [W, N], scale i32 [G, N / 8] and groups i16 [2 G] as they are; scale_max f16 [G] over
    256; perm i16 [K], the input that each packed column multiplies, its 16 bits unsigned; map i16
    [2 K], of each packed column its group and how many columns the group has from it on.
    Raises ValueError for a dtype or shape that it would not take.
    """
    for name, dtype in DTYPES.items():
        if stored[name].dtype != dtype:
            raise ValueError(f"q_{name} is {stored[name].dtype}, exllamav2 takes {dtype}")
    words, entries, scale = stored["weight"], stored["groups"], stored["scale"]
    G, N, K = len(scale), words.shape[1], len(stored["invperm"])
    bits = entries[0::2].long()
    ends = torch.cat([entries[1::2].long()[1:], bits.new_tensor([len(words)])])
    sizes = (ends - entries[1::2]) * 32 // bits
    found = {"q_scale": scale.shape[1] * 8, "q_invperm": int(sizes.sum())}
    expected = {"q_scale": N, "q_invperm": K}
    if found != expected or {len(stored["scale_max"]), len(bits)} != {G}:
        raise ValueError(f"a linear of {G} groups has {found}, where {expected} is expected")
    behind = torch.arange(K, device=words.device) - (sizes.cumsum(0) - sizes).repeat_interleave(
        sizes
    )
    group = torch.arange(G, device=words.device).repeat_interleave(sizes)
    return {
        "weight": words.clone(),
        "scale": scale.clone(),
        "scale_max": stored["scale_max"] * (1 / 256),
        "groups": entries.clone(),
        "perm": stored["invperm"].argsort().short(),
        "map": torch.stack([group, sizes[group] - behind], 1).flatten().short(),
    }


class Matrix:
    """One linear [N, K] in exllamav2's kernels, on the GPU of its tensors."""

    def __init__(self, stored: Mapping[str, Tensor], scratch: Tensor) -> None:
        """stored: as of `arguments`, which it copies. scratch: f16, K * N of it, for products of
        more than 32 tokens, which write the weight out; matrices may share it."""
        library, self._tensors = load(), arguments(stored)
        words = self._tensors["weight"]
        self.K, self.N, self._scratch = len(self._tensors["perm"]), words.shape[1], scratch
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors.values())
        if scratch.dtype != torch.float16 or scratch.numel() < self.K * self.N:
            raise ValueError(f"scratch has {scratch.numel()} of {self.K * self.N} halves")
        names = ("weight", "perm", "scale", "scale_max", "groups", "map")
        self._matrix = library.exl2_make(
            words.device.index,
            self.K,
            self.N,
            len(self._tensors["scale"]),
            *(self._tensors[name].data_ptr() for name in names),
            scratch.data_ptr(),
            MOST_DEQUANTIZED // self.N,
            stream(),
        )
        weakref.finalize(self, library.exl2_free, self._matrix)

    def reconstruct(self) -> Tensor:
        """The weight as its kernels have it, f16 [N, K]."""
        out = torch.full((self.K, self.N), torch.nan, dtype=torch.half, device=self._scratch.device)
        _check(load().exl2_reconstruct(self._matrix, out.data_ptr(), stream()))
        return out.T

    def product(self, x: Tensor) -> Tensor:
        """f16 [T, N] of f16 [T, K], by the way that exllamav2 goes for so many tokens."""
        if x.dtype != torch.float16 or x.shape[1:] != (self.K,) or not x.is_contiguous():
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, not f16 [T, {self.K}] in one piece")
        y = torch.empty(len(x), self.N, dtype=torch.half, device=x.device)
        cublas = torch.cuda.current_blas_handle()
        _check(
            load().exl2_product(self._matrix, x.data_ptr(), y.data_ptr(), len(x), cublas, stream())
        )
        return y


def tune(matrices: Sequence[Matrix]) -> None:
    """Let it choose its blocks for a shape anew, which it does by timing its first products."""
    load().exl2_forget_choices()
    for T in range(1, TUNED_TOKENS + 1):
        x = torch.randn(T, matrices[0].K, dtype=torch.half, device="cuda")
        for i in range(TUNING_CALLS):
            matrices[i % len(matrices)].product(x)


def random_linear(N: int, widths: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Tensors of a linear of random codes with 128 columns in each group: every bit is legal.

    Groups lie by falling width, and columns in an order of their own, as in exllamav2's files.
    """

    def words(*shape: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, shape, device=device).int()

    bits = torch.tensor(sorted(widths, reverse=True))
    rows = bits * GROUP // 32
    entries = torch.stack([bits, rows.cumsum(0) - rows], 1).flatten().short()
    return {
        "weight": words(int(rows.sum()), N),
        "groups": entries.to(device),
        "scale": words(len(bits), N // 8),
        "scale_max": (torch.rand(len(bits), device=device) * 0.01 + 0.001).half(),
        "invperm": torch.randperm(len(bits) * GROUP, device=device).int(),
    }


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"CUDA error {error} in exllamav2's kernels")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
