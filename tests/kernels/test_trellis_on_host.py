"""The CUDA product of trellis codes, run on the host thread by thread (`cuda_on_host.h`)."""

import pytest
import torch

from bitmill.quant.rotation import rotate
from bitmill_kernels.trellis.layout import RATES, tile_bytes, tile_count
from bitmill_kernels.trellis.product import member_table, stored_groups
from cuda_on_host import FOLDER, address, host_library
from trellis_models import random_linear

CALLS = """
extern "C" void multiply(const void* x, int tokens, int K, const int* order, const float* groups,
                         const void* table, int count, const void* members, int member_count,
                         int tiles, int N, const float* rows, void* inner, float* factors,
                         void* y) {
  launch({count, tokens}, kGroup, [=] {
    prologue<__half>((const __half*)x, K, order, groups, member_count, (__half*)inner, factors);
  });
  const Stack stack = {(const Member*)members, member_count, tiles};
  launch({tiles}, 32 * kWarps, [=] {
    product<__half, 2>((const Group*)table, count, stack, N, tokens, (const __half*)inner, factors,
                       rows, (__half*)y);
  });
}
extern "C" void decode_all(const void* table, int count, int first, int end, int K,
                           const float* rows, const float* groups, float* out) {
  launch({(end - first + 15) / 16, (count + kWarps - 1) / kWarps}, 32 * kWarps, [=] {
    decode_rows<float>((const Group*)table, count, first, end, K, rows, groups, out);
  });
}
extern "C" void rotate_all(const float* x, int tokens, int K, const int* order, float* out) {
  launch({tokens, (K + kGroup - 1) / kGroup}, kGroup, [=] { rotate(x, K, order, out); });
}
template <int RATE>
void decode_pieces(const uint8_t* circle, uint32_t* out) {
  for (int i = 0; i < 16; ++i) {
    uint32_t registers[4][4];
    decode(load_two<RATE>(circle, i), registers[0], registers[1]);
    decode<RATE>(load_piece<RATE, false>(circle, 2 * i), registers[2]);
    decode<RATE>(load_piece<RATE, false>(circle, 2 * i + 1), registers[3]);
    std::memcpy(out + 16 * i, registers, sizeof(registers));
  }
}
extern "C" void pieces(int rate, const uint8_t* circle, uint32_t* out) {
  switch (rate) {
    case 1: return decode_pieces<1>(circle, out);
    case 2: return decode_pieces<2>(circle, out);
    case 3: return decode_pieces<3>(circle, out);
    case 4: return decode_pieces<4>(circle, out);
    case 5: return decode_pieces<5>(circle, out);
    case 6: return decode_pieces<6>(circle, out);
    case 7: return decode_pieces<7>(circle, out);
    default: return decode_pieces<8>(circle, out);
  }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels as a library of the host, without what launches them on a GPU."""
    source = (FOLDER / "product_cuda.cu").read_text()
    kernels = source[: source.index("template <typename T>\ncudaError_t multiply_all")]
    return host_library(kernels, CALLS, tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize(
    ("N", "K", "rates"),
    [(37, 300, (3, 5, 1)), (16, 272, (6, 7, 8)), (20, 256, (2, 4)), (18, 131, (2, 3))],
    ids=str,
)
def test_weights_and_rotated_inputs_are_those_of_the_definition(library, N, K, rates):
    draw = torch.Generator().manual_seed(N)
    order = torch.randperm(K, generator=draw).int()
    weight = random_linear(N, K, rates, draw, order)
    rows, groups = weight.row_scales.float(), weight.group_scales.float()
    stored = stored_groups(weight.circles, rates, K)
    table = torch.tensor([(c.data_ptr(), rate, tile_count(n)) for rate, n, c in stored])
    out = torch.full((N, K), torch.nan)
    library.decode_all(
        address(table), len(rates), 0, N, K, address(rows), address(groups), address(out)
    )
    torch.testing.assert_close(out, weight.packed_values())
    x = torch.randn(9, K, generator=draw)
    found = torch.empty(9, K)
    library.rotate_all(address(x), 9, K, address(order), address(found))
    torch.testing.assert_close(found, rotate(x[:, order.long()]))


@pytest.mark.parametrize(
    ("outputs", "mixes", "K"),
    [
        ((37,), [(3, 5, 1)], 300),
        ((16, 5, 33), [(6, 7, 8), (1, 2, 3), (4, 4, 4)], 272),
        ((20, 16), [(2, 4), (4, 2)], 256),
        ((18,), [(2, 3)], 131),
    ],
    ids=str,
)
def test_products_of_linears_of_one_input_are_those_of_their_weights(library, outputs, mixes, K):
    draw = torch.Generator().manual_seed(K)
    order = torch.randperm(K, generator=draw).int()
    weights = [
        random_linear(N, K, rates, draw, order) for N, rates in zip(outputs, mixes, strict=True)
    ]
    rows = torch.cat([weight.row_scales.float() for weight in weights])
    groups = torch.cat([weight.group_scales.float() for weight in weights])
    stored = [one for weight in weights for one in stored_groups(weight.circles, weight.widths, K)]
    table = torch.tensor([(c.data_ptr(), rate, tile_count(n)) for rate, n, c in stored])
    members = member_table(outputs, 16)
    tokens, N, count = 9, sum(outputs), len(mixes[0])
    x = torch.randn(tokens, K, generator=draw).half()
    inner = torch.empty(tokens, 128 * count, dtype=torch.float16)
    factors = torch.empty(len(outputs), tokens, count)
    y = torch.full((tokens, N), torch.nan, dtype=torch.float16)
    library.multiply(
        *(address(x), tokens, K, address(order), address(groups), address(table), count),
        *(address(members), len(members), sum(-(-n // 16) for n in outputs), N),
        *(address(rows), address(inner), address(factors), address(y)),
    )
    W = torch.cat([weight.dequantize() for weight in weights]).double()
    for found, own in zip(y.split(outputs, 1), W.split(outputs), strict=True):
        expected = x.double() @ own.T
        assert (found.double() - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("rate", RATES)
def test_two_pieces_read_together_are_those_read_one_by_one(library, rate):
    draw = torch.Generator().manual_seed(rate)
    circle = torch.randint(0, 256, (tile_bytes(rate),), generator=draw, dtype=torch.uint8)
    registers = torch.zeros(16, 2, 2, 4, dtype=torch.int32)
    library.pieces(rate, address(circle), address(registers))
    assert torch.equal(registers[:, 0], registers[:, 1])
    assert len(registers.unique()) > 100
