"""The decode kernel of trellis codes, run on the host (`cuda_on_host.h`), one block after another.

Barriers of shared memory, bulk copies and `ldmatrix` are written out here.
"""

import ctypes
import re

import pytest
import torch

from bitmill_kernels.hopper.schedule import BARRIER_BYTES, Arguments
from bitmill_kernels.trellis.decode_cuda import SHAPES, group_table, input_bytes, plan
from bitmill_kernels.trellis.product import full_circles, member_table, stored_groups
from cuda_on_host import FOLDER, address, host_library
from trellis_models import random_linear

MACHINE = """
inline uint8_t* shared_memory() {
  const auto all = reinterpret_cast<uintptr_t>(dynamic_shared.data());
  return reinterpret_cast<uint8_t*>((all + 1023) / 1024 * 1024);
}
inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(at) - shared_memory());
}
struct Barrier {
  int count, pending, bytes, phase;
  void look() {
    if (pending || bytes) return;
    pending = count, phase ^= 1;
  }
};
inline std::mutex guard;
inline std::condition_variable changed;
inline std::map<uint32_t, Barrier> barriers;
inline void barrier_init(uint32_t at, int count) { barriers[at] = {count, count, 0, 0}; }
inline void change(uint32_t at, int arrivals, int bytes) {
  std::lock_guard<std::mutex> lock(guard);
  barriers[at].pending -= arrivals, barriers[at].bytes += bytes;
  barriers[at].look();
  changed.notify_all();
}
inline void barrier_arrive(uint32_t at) { change(at, 1, 0); }
inline void barrier_expect(uint32_t at, int bytes) { change(at, 1, bytes); }
inline bool barrier_test(uint32_t at, int parity) {
  std::lock_guard<std::mutex> lock(guard);
  return barriers[at].phase != parity;
}
inline void barrier_wait(uint32_t at, int parity) {
  std::unique_lock<std::mutex> lock(guard);
  changed.wait(lock, [=] { return barriers[at].phase != parity; });
}
inline void bulk_copy(void* to, const void* from, int bytes, uint32_t barrier, uint64_t) {
  std::memcpy(to, from, bytes);
  change(barrier, 0, -bytes);
}
inline uint32_t rows_of_matrices[1024];
inline uint4 load_matrices(uint32_t from) {
  const int lane = threadIdx.x % 32, first = threadIdx.x - lane;
  rows_of_matrices[threadIdx.x] = from;
  __syncwarp();
  uint32_t found[4];
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = rows_of_matrices[first + 8 * i + lane / 4];
    std::memcpy(found + i, shared_memory() + row + lane % 4 * 4, 4);
  }
  __syncwarp();
  return {found[0], found[1], found[2], found[3]};
}
inline float2 load_factors(uint32_t from) {
  float2 found;
  std::memcpy(&found, shared_memory() + from, 8);
  return found;
}
struct Lane {
  int row, column;
};
template <int WARPS, int CELLS, int AT_ONCE, class... Rest>
void share_sums(Rest&&...) {
  std::abort();  // blocks run one after another, so none may wait for another
}
"""

CALLS = """
extern "C" void decode_all(const DecodeArguments* p, int columns, const float* scales,
                           const void* groups, const void* members, int count, int tiles,
                           int tokens, int blocks) {
  const int items = p->pair_count * p->tokens;
  launch({(items + kArrangeWarps - 1) / kArrangeWarps}, kArrangeWarps * 32, [=] {
    arrange_kernel(*p, columns, scales, count);
  });
  const Stack stack = {static_cast<const Member*>(members), count, tiles};
  const auto table = static_cast<const Group*>(groups);
  launch({blocks}, 5 * 32, [=] {
    if (tokens == 8) decode_kernel<4, 1, 8, 4>(*p, table, stack);
    if (tokens == 16) decode_kernel<4, 1, 16, 4>(*p, table, stack);
  });
}
"""


def part(text, first, end):
    """A text from one mark up to another."""
    begin = text.index(first)
    return text[begin : text.index(end, begin)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    hopper = FOLDER.parent / "hopper"
    units, wgmma = ((hopper / name).read_text() for name in ("units.h", "wgmma.h"))
    layout, decode = ((FOLDER / name).read_text() for name in ("arrange_cuda.h", "decode_cuda.cu"))
    function = "__device__ __forceinline__ "
    pieces = [
        "#include <condition_variable>\n#include <cstdlib>\n#include <map>\n#include <mutex>\n",
        '#include "circles_cuda.h"\nnamespace {\n',
        part(units, "// Activations are divided", "namespace {\n\ntemplate <class Row>"),
        "namespace {\n",
        MACHINE,
        part(units, function + "float load_bias(", "// Room of a pair's"),
        part(wgmma, "constexpr int kBarrierBytes", "// Bytes of one group's"),
        part(wgmma, function + "int input_offset", "// Where `wgmma` finds"),
        part(wgmma, function + "uint32_t word_of(__half2", "// Where a block's rings lie"),
        part(wgmma, "// Lets the producer", "// One warpgroup more than"),
        part(wgmma, function + "float factor_of", "// The largest absolute value"),
        part(layout, "constexpr int kGroup", "}  // namespace"),
        part(decode, "constexpr int kTile", function + "uint4 load_matrices"),
        part(
            decode,
            "// Streams all units",
            "template <int WARPS, int ROW_TILES, int TOKENS, int BLOCKS>\ncudaError_t",
        ),
    ]
    kernels = "".join(pieces)
    kernels = re.sub(r"asm volatile\((?:\"[^\"]*\"|[^\"])*?\);", "", kernels)
    kernels = kernels.replace(
        "extern __shared__ __align__(1024) uint8_t shared[];", "uint8_t* shared = shared_memory();"
    )
    return host_library(kernels, CALLS, tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize(("tokens", "whole"), [(1, False), (3, True), (13, True)], ids=str)
def test_linears_of_one_input_are_multiplied_in_one_launch(library, tokens, whole):
    K, outputs = 300, (100, 37, 64)
    mixes = [(3, 5, 1), (2, 2, 8), (6, 4, 7)]
    draw = torch.Generator().manual_seed(tokens)
    order = torch.randperm(K, generator=draw).int()
    weights, tables, kept = [], [], []
    for N, rates in zip(outputs, mixes, strict=True):
        weights.append(random_linear(N, K, rates, draw, order))
        stored = stored_groups(weights[-1].circles, rates, K)
        kept.append([full_circles(one) for _, _, one in stored])
        tables.append(torch.from_numpy(group_table([one.data_ptr() for one in kept[-1]], rates)))
    shape = SHAPES[1]
    assert shape.rows == 64
    tiles = sum(-(-N // shape.rows) for N in outputs)
    rows = torch.cat([weight.row_scales.float() for weight in weights])
    groups = torch.cat([weight.group_scales.float() for weight in weights])
    table, members = torch.cat(tables), member_table(outputs, shape.rows)
    x = torch.randn(tokens, K, generator=draw).half()
    y = torch.full((tokens, sum(outputs)), torch.nan, dtype=torch.float16)
    inputs = torch.zeros(3, input_bytes(tokens, 3), dtype=torch.uint8)
    most = 8 if tokens <= 8 else 16
    stages = plan(8, shape, most, 3)
    assert stages.bytes * 3 + BARRIER_BYTES < 1 << 17
    arguments = Arguments(
        x=x.data_ptr(),
        order=order.data_ptr(),
        inputs=inputs.data_ptr(),
        row_scales=rows.data_ptr(),
        y=y.data_ptr(),
        pair_count=3,
        tokens=tokens,
        x_stride=K,
        output_stride=sum(outputs),
        stage_count=3,
        stage_bytes=stages.bytes,
    )
    library.decode_all(
        *(ctypes.byref(arguments), K, address(groups), address(table), address(members), 3, tiles),
        *(most, 1 if whole else tiles),
    )
    W = torch.cat([weight.dequantize() for weight in weights]).double()
    for found, own in zip(y.split(outputs, 1), W.split(outputs), strict=True):
        expected = x.double() @ own.T
        assert (found.double() - expected).norm() < 6e-4 * expected.norm()
