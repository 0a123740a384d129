"""How inputs of the kernels for Hopper are arranged, run on the host (`cuda_on_host.h`)."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from bitmill.quant.rotation import rotate
from bitmill_kernels.hopper.schedule import Arguments, group_bytes
from bitmill_kernels.trellis.decode_cuda import input_bytes
from cuda_on_host import FOLDER, address, host_library

CALLS = """
extern "C" void arrange(const DecodeArguments* p, int columns, const float* scales, float largest,
                        int tile, int finds) {
  if (!finds) {
    launch({p->tokens}, kFactorThreads, [=] { factor_kernel(*p, columns, largest); });
  }
  const int groups = (columns + kGroup - 1) / kGroup;
  launch({p->tokens * ((groups + kWarps - 1) / kWarps)}, kPrologueThreads, [=] {
    arrange_kernel(*p, columns, scales, largest, tile, finds);
  });
}
extern "C" void arrange_few(const DecodeArguments* p, int columns, const float* scales,
                            int members) {
  const int items = p->pair_count * p->tokens;
  launch({(items + few::kArrangeWarps - 1) / few::kArrangeWarps}, few::kArrangeWarps * 32, [=] {
    few::arrange_kernel(*p, columns, scales, members);
  });
}
"""


def part(text, first, end):
    """A text from one mark up to another."""
    begin = text.index(first)
    return text[begin : text.index(end, begin)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels as a library of the host, without their waits for other kernels."""
    hopper = FOLDER.parent / "hopper"
    units, wgmma = (Path(hopper, name).read_text() for name in ("units.h", "wgmma.h"))
    names = ("arrange_cuda.h", "batch_cuda.cu", "decode_cuda.cu")
    layout, batch, decode = ((FOLDER / name).read_text() for name in names)
    structs = part(units, "// Activations are divided", "namespace {\n\ntemplate <class Row>")
    pieces = [
        "namespace {\n",
        structs + "namespace {\n",
        part(units, "__device__ __forceinline__ float load_input(", "\n}\n") + "\n}\n",
        part(wgmma, "constexpr int kPrologueThreads", "__device__ __forceinline__ void warpgroup"),
        part(wgmma, "__device__ __forceinline__ int input_offset", "\n}\n") + "\n}\n",
        part(wgmma, "__device__ __forceinline__ uint32_t word_of(__half2", "\n}\n") + "\n}\n",
        part(wgmma, "// The power of two that brings `largest`", "// All tokens, `TOKENS` in a"),
        part(layout, "constexpr int kGroup", "}  // namespace"),
        "namespace few {\n",
        part(decode, "constexpr int kArrangeWarps", "// Groups of a linear"),
        part(decode, "// Bytes of a group's arranged", "__device__ __forceinline__ uint4"),
        "}\n",
        part(batch, "constexpr int kWarps", "// Units are the circles"),
        part(batch, "// Arranges activations", "}  // namespace"),
    ]
    kernels = re.sub(r"asm volatile\(.*?;", "", "".join(pieces), flags=re.DOTALL)
    kernels = kernels.replace('" ::: "memory");', "").replace('");', "")
    return host_library(kernels, CALLS, tmp_path_factory.mktemp("host"))


def in_layout(inputs, tile, tokens, groups):
    """Rows [tokens, 128 groups] of what lies in wgmma.h's swizzle, columns of tiles exchanged."""
    blocks = inputs.view(torch.float16).view(-1, groups, 2, tile, 8, 8)
    rows = torch.empty(blocks.shape[0], tile, groups, 2, 8, 8, dtype=torch.float16)
    for token in range(tile):
        for eighth in range(8):
            rows[:, token, :, :, eighth] = blocks[:, :, :, token, eighth ^ token % 8]
    # 32 columns: product, half of its columns, tile, pair of columns, column; back into tile, half,
    # pair, product, column.
    two_tiles = rows.view(-1, tile, groups, 4, 2, 2, 2, 2, 2).permute(0, 1, 2, 3, 6, 5, 7, 4, 8)
    return two_tiles.reshape(-1, 128 * groups)[:tokens]


def activations(K, tokens, dtype):
    """x of many sizes, an order, two linears' scales of groups [2, G], and rotated x."""
    draw = torch.Generator().manual_seed(K)
    sizes = 10.0 ** (torch.arange(tokens) % 9 - 4)
    x = (torch.randn(tokens, K, generator=draw) * sizes[:, None]).to(dtype)
    order = torch.randperm(K, generator=draw).int()
    scales = torch.rand(2, -(-K // 128), generator=draw)
    return x, order, scales, rotate(x.float()[:, order.long()])


def arguments_of(x, order, inputs, groups, factors=None):
    tokens, K = x.shape
    return Arguments(
        x=x.data_ptr(),
        order=order.data_ptr(),
        inputs=inputs.data_ptr(),
        factors=None if factors is None else factors.data_ptr(),
        pair_count=groups,
        tokens=tokens,
        x_stride=K,
        is_bf16=int(x.dtype == torch.bfloat16),
    )


@pytest.mark.parametrize(("K", "tokens"), [(300, 3), (1127, 1), (640, 16), (128, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inputs_of_the_decode_kernel_have_factors_of_their_groups(library, K, tokens, dtype):
    x, order, scales, wanted = activations(K, tokens, dtype)
    members, groups = scales.shape
    inputs = torch.zeros(groups, input_bytes(tokens, members), dtype=torch.uint8)
    pointer = ctypes.byref(arguments_of(x, order, inputs, groups))
    library.arrange_few(pointer, K, address(scales), members)
    arranged = inputs[:, : 256 * tokens].contiguous()
    found = in_layout(arranged, tokens, tokens, groups).float().view(tokens, groups, 128)
    factors = inputs[:, 256 * tokens :].contiguous().view(torch.float32)
    factors = factors.view(groups, members, -1)[:, :, :tokens].permute(1, 2, 0)
    assert (found.abs().amax(2) < 2**15).all()
    assert (found.abs().amax(2) >= 2**14).all()
    for own, scale in zip(factors, scales, strict=True):
        whole = (found * own[:, :, None]).flatten(1)
        scaled = wanted * scale.repeat_interleave(128)[:K]
        errors = (whole[:, :K] - scaled).norm(dim=1) / scaled.norm(dim=1)
        assert (errors < 5e-4).all()
        assert (whole[:, K:] == 0).all()


@pytest.mark.parametrize("finds", [True, False])
@pytest.mark.parametrize(("K", "tokens", "tile"), [(300, 3, 8), (1127, 1, 8), (640, 19, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inputs_are_ordered_rotated_and_kept_in_range(library, K, tokens, tile, dtype, finds):
    x, order, scales, wanted = activations(K, tokens, dtype)
    groups = scales.numel()
    inputs = torch.zeros(-(-tokens // tile) * groups * group_bytes(tile), dtype=torch.uint8)
    factors = torch.zeros(tokens)
    largest = float(scales.max()) * 11.3138
    pointer = ctypes.byref(arguments_of(x, order, inputs, groups, factors))
    library.arrange(pointer, K, address(scales), ctypes.c_float(largest), tile, int(finds))
    arranged = in_layout(inputs, tile, tokens, groups).float()
    assert torch.equal(factors.log2(), factors.log2().round())
    assert (arranged.abs().amax(1) < 2**15).all()
    for own, scale in zip(arranged.chunk(2, 1), scales, strict=True):
        scaled = wanted * scale.repeat_interleave(128)[:K]
        found = own * factors[:, None]
        errors = (found[:, :K] - scaled).norm(dim=1) / scaled.norm(dim=1)
        assert (errors < 5e-4).all()
        assert (found[:, K:] == 0).all()
