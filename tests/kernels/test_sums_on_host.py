"""How blocks share the sums of a tile (`hopper/sums.h`), run on the host, all blocks at once."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from bitmill_kernels.hopper.schedule import Arguments
from bitmill_kernels.workspace import NOTHING, workspace
from cuda_on_host import FOLDER, address, host_library

WORDS = """
#include <atomic>
inline void __syncwarp() {}
inline float __uint_as_float(uint32_t word) { return __int_as_float(word); }
inline uint4 look(const uint4* from) {
  const auto* words = reinterpret_cast<const std::atomic<uint32_t>*>(from);
  std::this_thread::yield();
  return {words[0], words[1], words[2], words[3]};
}
inline void put(uint4* to, uint4 from) {
  auto* words = reinterpret_cast<std::atomic<uint32_t>*>(to);
  words[0] = from.x, words[1] = from.y, words[2] = from.z, words[3] = from.w;
}
"""

CALLS = """
extern "C" void share(const DecodeArguments* p, int blocks, int takers, float* sums) {
  constexpr int kCells = CELLS, kPart = kCells < 4 ? kCells : kCells / 4;
  Target tile = {};
  tile.blocks = blocks, tile.first_block = 1, tile.ends = takers;
  std::vector<std::thread> all;
  for (int thread = 0; thread < 32; ++thread)
    for (int self = 0; self < blocks; ++self)
      all.emplace_back([=] {
        const auto own = [&](int cell) { return cell / kPart * takers / 4 == self; };
        const auto live = [&](int cell) { return cell * 8 + 2 * (thread % 4) < p->tokens; };
        auto& total =
            *reinterpret_cast<float(*)[4 * kCells]>(sums + (self * 32 + thread) * 4 * kCells);
        share_sums<1, kCells, kPart>(*p, tile, 0, thread, self, own, live, total);
      });
  for (std::thread& one : all) one.join();
}
"""


@pytest.fixture(scope="module", params=[1, 4, 8], ids="{} cells".format)
def library(request, tmp_path_factory):
    units, sums = ((FOLDER.parent / "hopper" / name).read_text() for name in ("units.h", "sums.h"))
    structs = units[units.index("// Packed columns [first") : units.index("template <class Row>")]
    kernels = sums[sums.index("constexpr uint32_t kNothing") : sums.rindex("}  // namespace")]
    begin, end = kernels.index("__device__"), kernels.index("__device__ __forceinline__ uint32_t w")
    kernels = re.sub(r"}  // namespace\n", "}\n", structs) + kernels[:begin] + kernels[end:]
    text = f"namespace {{\n{WORDS}{kernels}"
    folder = Path(tmp_path_factory.mktemp("host"))
    calls = CALLS.replace("CELLS", str(request.param))
    return request.param, host_library(text, calls, folder)


@pytest.mark.parametrize(("blocks", "takers"), [(2, 1), (3, 3), (5, 4), (6, 1), (9, 2)])
def test_takers_add_what_all_blocks_have_left(library, blocks, takers):
    cells, found = library
    tokens = 8 * cells - 3
    draw = torch.Generator().manual_seed(blocks)
    cpu = torch.device("cpu")
    partial = workspace("a test", (blocks + 1) * 2 * 32 * cells * 16, cpu, fill=NOTHING)
    for _ in range(3):
        own = torch.randn(blocks, 32, cells, 4, generator=draw)
        sums = own.clone()
        arguments = Arguments(partial=partial.data_ptr(), tokens=tokens)
        found.share(ctypes.byref(arguments), blocks, takers, address(sums))
        part = max(cells // 4, 1) if cells >= 4 else cells
        for cell in range(cells):
            taker = cell // part * takers // 4
            live = cell * 8 + 2 * (torch.arange(32) % 4) < tokens
            wanted = own[taker, :, cell].clone()
            for block in range(blocks):
                if block != taker:
                    wanted += own[block, :, cell]
            assert torch.equal(sums[taker, live, cell], wanted[live])
        assert (partial == NOTHING).all()


def test_a_sum_that_is_no_number_is_not_waited_for(library):
    cells, found = library
    partial = torch.full((3 * 2 * 32 * cells * 16,), NOTHING, dtype=torch.uint8)
    sums = torch.ones(2, 32, cells, 4)
    sums.view(torch.int32)[1, 0, 0, 0] = -1
    arguments = Arguments(partial=partial.data_ptr(), tokens=8 * cells)
    found.share(ctypes.byref(arguments), 2, 1, address(sums))
    assert sums[0].isnan().sum() == 1
    assert sums[0, 0, 0, 0].isnan()
    assert (partial == NOTHING).all()


def test_a_buffer_that_begins_filled_is_handed_to_nobody_else():
    cpu = torch.device("cpu")
    filled = workspace("shared name", 100, cpu, fill=NOTHING)
    plain = workspace("shared name", 200, cpu)
    assert (filled == NOTHING).all()
    assert plain.data_ptr() != filled.data_ptr()
    assert workspace("shared name", 50, cpu, fill=NOTHING).data_ptr() == filled.data_ptr()
    assert (workspace("shared name", 300, cpu, fill=NOTHING) == NOTHING).all()
