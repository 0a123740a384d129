"""How activations of packed weights are arranged, run on the host (`cuda_on_host.h`)."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from bitmill_kernels.hopper.schedule import Arguments, group_bytes
from bitmill_kernels.matmul import batch_cuda
from cuda_on_host import host_library

CALLS = """
extern "C" void arrange(const DecodeArguments* p, int tile, int slices) {
  launch({(slices * p->pair_count + 3) / 4}, kPrologueThreads, [=] {
    p->is_bf16 ? arrange_kernel<true>(*p, tile, slices) : arrange_kernel<false>(*p, tile, slices);
  });
}
extern "C" void arrange_rows(const DecodeArguments* p, int columns, int tile, int parts) {
  launch({p->tokens * parts}, 64, [=] {
    p->is_bf16 ? arrange_row_kernel<true>(*p, columns, tile, parts)
               : arrange_row_kernel<false>(*p, columns, tile, parts);
  });
}
"""
ROW = "extern __shared__ __align__(16) uint16_t row[];"
LOW = {1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 8}
WIDTHS = (1, 2, 3, 4, 5, 6, 8)


def part(text, first, end):
    """A text from one mark up to another."""
    begin = text.index(first)
    return text[begin : text.index(end, begin)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernel as a library of the host, without its waits for other kernels."""
    folder = Path(batch_cuda.__file__).parent
    headers = folder.parent / "hopper"
    units, wgmma = ((headers / name).read_text() for name in ("units.h", "wgmma.h"))
    batch = (folder / "batch_cuda.cu").read_text()
    pieces = [
        "namespace {\n",
        part(units, "// Packed columns [first", "namespace {\n\ntemplate <class Row>"),
        "namespace {\n",
        part(units, "__device__ __forceinline__ int low_plane", "\n}\n") + "\n}\n",
        part(wgmma, "constexpr int kPrologueThreads", "__device__ __forceinline__ void warpgroup"),
        part(wgmma, "__device__ __forceinline__ int input_offset", "\n}\n") + "\n}\n",
        part(wgmma, "__device__ __forceinline__ uint32_t word_of(__half2", "\n}\n") + "\n}\n",
        "constexpr int kRowThreads = 64;\n",
        part(batch, "// bf16 activations as halves", "cudaError_t arrange"),
    ]
    kernels = re.sub(r"asm volatile\(.*?\);", "", "".join(pieces))
    assert ROW in kernels
    shared = "auto* row = reinterpret_cast<uint16_t*>(dynamic_shared.data());"
    kernels = kernels.replace(ROW, shared)
    return host_library(kernels, CALLS, tmp_path_factory.mktemp("host"))


def columns_of(width):
    """Columns [16, 8] of a group that pieces of its products hold, as `Affine` reads its planes."""
    low = LOW[width]
    found = torch.empty(16, 4, 2, dtype=torch.long)
    for piece in range(16):
        field, step, half = piece // 2 // low, piece // 2 % low, piece % 2
        for column in range(4):
            if width in (1, 3, 5):
                word = 8 * step + 2 * column + half
            else:
                word = 16 * (step // 2) + 4 * column + 2 * (step % 2) + half
            found[piece, column] = 16 * low * field + 2 * word + torch.arange(2)
    return found.view(16, 8)


@pytest.mark.parametrize("rows", [False, True], ids=["spread", "rows"])
@pytest.mark.parametrize("order", ["none", "moved", "mixed"])
@pytest.mark.parametrize(
    ("tokens", "tile", "slices", "tail"), [(3, 32, 1, 40), (35, 32, 5, 40), (5, 64, 5, 43)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_activations_lie_where_products_read_them(
    library, tokens, tile, slices, tail, dtype, order, rows
):
    K = 15 * 128 + tail
    draw = torch.Generator().manual_seed(K)
    x = torch.randn(tokens, K, generator=draw).to(dtype)
    columns = {
        "none": torch.arange(K),
        "moved": torch.arange(K).roll(128),
        "mixed": torch.randperm(K, generator=draw),
    }[order]
    table = columns.int()
    pairs = [
        (w, 256 * i, 256 * i + 128, 128, min(128, K - 256 * i - 128)) for i, w in enumerate(WIDTHS)
    ]
    pairs += [(2, 14 * 128, 0, 128, 0), (3, 0, 15 * 128, 0, tail)]
    stored = torch.tensor(pairs, dtype=torch.int32)
    factors = 2.0 ** torch.arange(-3, 4)[torch.arange(tokens) % 7]
    launches = -(-tokens // tile)
    inputs = torch.zeros(launches * 2 * len(pairs) * group_bytes(tile), dtype=torch.uint8)
    arguments = Arguments(
        pairs=stored.data_ptr(),
        x=x.data_ptr(),
        order=None if order == "none" else table.data_ptr(),
        inputs=inputs.data_ptr(),
        factors=factors.data_ptr(),
        pair_count=len(pairs),
        tokens=tokens,
        x_stride=K,
        is_bf16=int(dtype == torch.bfloat16),
    )
    if rows:
        library.arrange_rows(ctypes.byref(arguments), K, tile, 1 + slices % 2)
    else:
        library.arrange(ctypes.byref(arguments), tile, slices)
    found = inputs.view(torch.float16).view(launches, len(pairs), 2, 2, tile, 8, 8)
    expected = torch.zeros_like(found)
    scale = factors if dtype == torch.bfloat16 else torch.ones(tokens)
    padded = torch.cat([x.float()[:, columns] / scale[:, None], torch.zeros(tokens, 128)], dim=1)
    for i, (width, first, second, live, live_second) in enumerate(pairs):
        for g, (start, count) in enumerate([(first, live), (second, live_second)]):
            wanted = padded[:, start : start + 128].clone()
            wanted[:, count:] = 0
            wanted = wanted[:, columns_of(width)].half()
            for token in range(tokens):
                own = expected[token // tile, i, g, :, token % tile]
                own[:, torch.arange(8) ^ token % 8] = wanted[token].view(2, 8, 8)
    assert torch.equal(found, expected)
