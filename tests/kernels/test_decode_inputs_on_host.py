"""How the decode kernel converts activations, run on the host (`cuda_on_host.h`)."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from bitmill_kernels.hopper.schedule import Arguments
from bitmill_kernels.matmul import decode_cuda
from cuda_on_host import address, host_library

CALLS = """
extern "C" void convert_once(const DecodeArguments* p) {
  launch({(p->pair_count * p->tokens + kPrologueWarps - 1) / kPrologueWarps}, kPrologueWarps * 32,
         [=] { prologue_kernel(*p); });
}
extern "C" void convert_block(const DecodeArguments* p, const UnitRow* units, int count,
                              uint8_t* chunks) {
  launch({1}, 128, [=] {
    const int warp = threadIdx.x / 32, thread = threadIdx.x % 32;
    p->tokens == 1 ? convert_own<4, 1>(*p, units, count, warp, thread, chunks)
                   : convert_own<4, kTokensAtOnce>(*p, units, count, warp, thread, chunks);
  });
}
"""
LOW = {1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 8}
WIDTHS = (1, 2, 3, 4, 5, 6, 8)
TAIL = 44
K = 15 * 128 + TAIL


def part(text, first, end):
    """A text from one mark up to another."""
    begin = text.index(first)
    return text[begin : text.index(end, begin)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """What converts as a library of the host, without its waits for other kernels."""
    source = Path(decode_cuda.__file__).with_name("decode_cuda.cu").read_text()
    units = (Path(decode_cuda.__file__).parents[1] / "hopper" / "units.h").read_text()
    pieces = [
        "namespace {\n",
        part(units, "// Activations are divided by", "__device__ __forceinline__ uint32_t shared"),
        part(units, "__device__ __forceinline__ int low_plane", "\n}\n") + "\n}\n",
        part(units, "__device__ __forceinline__ float load_input", "\n}\n") + "\n}\n",
        part(source, "constexpr int kPrologueWarps", "\n\n"),
        part(source, "// Bytes of one pair's activations", "template <int WARPS, int ROW_TILES"),
        part(source, "// Converts the activations of every pair", "template <int WARPS, int ROW"),
    ]
    kernels = re.sub(r"asm volatile\(.*?\);", "", "\n".join(pieces))
    return host_library(kernels, CALLS, tmp_path_factory.mktemp("host"))


def fields_of(width):
    """Columns [4, 4, 4, 2] of a group that (vector, lane, word, half) holds, and place values."""
    vector, lane, word, half = torch.meshgrid(*map(torch.arange, (4, 4, 4, 2)), indexing="ij")
    product, low = 2 * vector + word // 2, LOW[width]
    field, step = product // low, product % low
    if width in (1, 3, 5):
        at = 8 * step + 2 * lane + word % 2
    else:
        at = 16 * (step // 2) + 4 * lane + 2 * (step % 2) + word % 2
    return 16 * low * field + 2 * at + half, 2.0 ** (low * field)


PAIRS = [
    *((w, (256 * i, 256 * i + 128), (128, 128)) for i, w in enumerate(WIDTHS)),
    (2, (14 * 128, 0), (128, 0)),
    (3, (0, 15 * 128), (0, TAIL)),
]


def case(tokens, dtype, order, aligned):
    """(activations f32 [T, K] in packed order, arguments, what they point at)."""
    draw = torch.Generator().manual_seed(tokens)
    shift = 0 if aligned else 1
    held = torch.randn(tokens, K + 4 + shift, generator=draw)
    held *= 2.0 ** torch.arange(-3, 4)[torch.arange(tokens) % 7, None]
    held = held.to(dtype)
    x = held[:, shift : K + shift]
    columns = torch.randperm(K, generator=draw) if order else torch.arange(K)
    table, pairs = columns.int(), torch.tensor([[w, *first, *live] for w, first, live in PAIRS])
    pairs = pairs.int()
    arguments = Arguments(
        pairs=pairs.data_ptr(),
        x=x.data_ptr(),
        order=table.data_ptr() if order else None,
        pair_count=len(PAIRS),
        tokens=tokens,
        x_stride=held.stride(0),
        is_bf16=int(dtype == torch.bfloat16),
    )
    return x.float()[:, columns], arguments, (held, table, pairs)


CASES = pytest.mark.parametrize(
    ("dtype", "order", "aligned"),
    [
        (torch.float16, False, True),
        (torch.bfloat16, False, True),
        (torch.bfloat16, False, False),
        (torch.float16, True, True),
    ],
    ids=["fp16", "bf16", "unaligned", "moved"],
)


def converted_once(library, tokens, arguments):
    inputs = torch.full((len(PAIRS), 528 * tokens), 255, dtype=torch.uint8)
    arguments.inputs = inputs.data_ptr()
    library.convert_once(ctypes.byref(arguments))
    arguments.inputs = None
    return inputs


@CASES
@pytest.mark.parametrize("tokens", [1, 3, 13])
def test_converted_activations_are_those_that_came(library, tokens, dtype, order, aligned):
    x, arguments, _held = case(tokens, dtype, order, aligned)
    inputs = converted_once(library, tokens, arguments)
    vectors = inputs[:, : 512 * tokens].contiguous().view(torch.float16)
    vectors = vectors.view(len(PAIRS), 2, 4, tokens, 4, 4, 2).float()
    tails = inputs[:, 512 * tokens :].contiguous().view(torch.float32)
    tails = tails.view(len(PAIRS), 2, tokens, 2)
    for i, (width, first, live) in enumerate(PAIRS):
        columns, places = fields_of(width)
        for group in range(2):
            wanted = torch.zeros(tokens, 128)
            wanted[:, : live[group]] = x[:, first[group] :][:, : live[group]]
            scale, total = tails[i, group].unbind(-1)
            found = vectors[i, group].transpose(0, 1) * places * scale[:, None, None, None, None]
            assert torch.equal(found / 2**24, wanted[:, columns])
            torch.testing.assert_close(total, wanted.sum(1), rtol=1e-5, atol=1e-5)
            if live[group]:
                largest = (vectors[i, group].transpose(0, 1) * places).abs().flatten(1).amax(1)
                assert (largest >= 2.0**14).all()
                assert (largest < 2.0**15).all()


@CASES
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8])
def test_a_block_converts_its_pairs_as_the_prologue_does(library, tokens, dtype, order, aligned):
    _, arguments, _held = case(tokens, dtype, order, aligned)
    expected = converted_once(library, tokens, arguments)
    for own in ([4], [7, 8, 0], [6, 5, 4, 3, 2, 1, 0, 8, 7]):
        units = torch.zeros(len(own), 12, dtype=torch.int32)
        for row, pair in zip(units, own, strict=True):
            width, first, live = PAIRS[pair]
            row[8:] = torch.tensor([*first, live[0] | live[1] << 16, width])
        chunks = torch.full((len(own) + 1, 528 * tokens), 255, dtype=torch.uint8)
        library.convert_block(ctypes.byref(arguments), address(units), len(own), address(chunks))
        assert torch.equal(chunks[:-1], expected[own])
        assert (chunks[-1] == 255).all()
