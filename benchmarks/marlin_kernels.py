"""Marlin's CUDA kernels of one linear of 4 bits, as GPTQModel has them, without torch's extensions.

    PYTHONPATH=SOURCES python benchmarks/marlin_kernels.py LIBRARY.so

compiles them with `marlin_kernels.cu`. SOURCES is the folder of gptqmodel-7.7.0.tar.gz, unpacked.
BITMILL_MARLIN_LIBRARY names such a library; without, a process compiles one (`peer_library.py`).
Groups of 128 columns, with zero points or symmetric around 8; its sums of blocks that share a tile
are in fp32, which is GPTQModel's and vLLM's default.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import peer_library
import torch
from peer_library import check, stream
from torch import Tensor

GROUP = 128
FLAGS = ("--expt-relaxed-constexpr", "--split-compile=0", "-diag-suppress=177")
TILE_TOKENS, TILE_ROWS = 64, 256
"""The largest tile of sums."""
INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight zero points lie in a word one after another."""


def build(library: Path) -> Path:
    """Compile; raises RuntimeError with what nvcc said."""
    advice = "unpack gptqmodel's source distribution and put its folder there"
    sources = peer_library.folder_of("gptqmodel_ext", advice) / "marlin"
    flags = [*FLAGS, f"-I{sources}", f'-DGPTQMODEL_VERSION="{version("gptqmodel")}"']
    own = Path(__file__).with_suffix(".cu")
    return peer_library.compiled(library, [own], peer_library.STAND_IN, flags)


@cache
def load() -> ctypes.CDLL:
    """The library; raises RuntimeError or OSError."""
    library = peer_library.loaded("BITMILL_MARLIN_LIBRARY", build)
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.marlin_repack.argtypes = [pointer] * 2 + [integer] * 2 + [pointer]
    library.marlin_product.argtypes = [
        *([pointer] * 5 + [integer] + [pointer] + [integer]),
        *([pointer] + [integer] * 3 + [pointer]),
    ]
    for name in ("version", "repack", "product"):
        getattr(library, f"marlin_{name}").restype = ctypes.c_char_p
    return library


def scales_in_order(scales: Tensor) -> Tensor:
    """[G, N] of [N, G]: of every 64 rows the first of each eight, then the second, and so on."""
    N, G = scales.shape
    return scales.t().reshape(-1, 8, 8).transpose(1, 2).reshape(G, N).contiguous()


def words(values: Tensor) -> Tensor:
    """i32 [...] of values below 16 [..., 8], the first in the lowest bits."""
    shifts = torch.arange(0, 32, 4, device=values.device)
    return (values.long() << shifts).sum(-1).int()


def packed_zeros(zeros: Tensor) -> Tensor:
    """i32 [G, N / 8] of u8 [N, G]: in the order of the scales, interleaved."""
    N, G = zeros.shape
    return words(scales_in_order(zeros).view(G, N // 8, 8)[..., list(INTERLEAVED)])


def packed_codes(codes: Tensor) -> Tensor:
    """i32 [K / 16, 2 N] of u8 [N, K], by Marlin's kernel from GPTQ's words."""
    N, K = codes.shape
    rows = words(codes.view(N, K // 8, 8)).t().contiguous()
    out = torch.empty(K // 16, 2 * N, dtype=torch.int32, device=codes.device)
    check(load().marlin_repack(rows.data_ptr(), out.data_ptr(), K, N, stream()))
    torch.cuda.current_stream().synchronize()
    return out


class Scratch:
    """What launches share: sums f32 of tiles and i32 locks, which every launch leaves at zero."""

    def __init__(self, device: torch.device) -> None:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        size = processors * TILE_TOKENS * TILE_ROWS
        self.sums = torch.empty(size, dtype=torch.float32, device=device)
        self.locks = torch.zeros(max(processors, 128), dtype=torch.int32, device=device)


def product(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, scratch: Scratch
) -> Tensor:
    """f16 [T, N] of f16 [T, K]; weight, scales and zeros packed, all points 8 without zeros."""
    T, K = x.shape
    N = scales.shape[1]
    y = torch.empty(T, N, dtype=torch.half, device=x.device)
    points = None if zeros is None else zeros.data_ptr()
    check(
        load().marlin_product(
            *(x.data_ptr(), weight.data_ptr(), scales.data_ptr(), points),
            *(scratch.sums.data_ptr(), scratch.sums.numel()),
            *(scratch.locks.data_ptr(), scratch.locks.numel()),
            *(y.data_ptr(), T, K, N, stream()),
        )
    )
    return y


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
