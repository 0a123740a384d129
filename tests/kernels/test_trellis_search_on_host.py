"""The CUDA search for trellis codes, run on the host thread by thread (`cuda_on_host.h`)."""

import pytest
import torch
from torch.nn import functional

from bitmill_kernels.trellis import group_cuda
from bitmill_kernels.trellis.code import (
    DEVIATION,
    decode_tiles,
    in_sequence,
    row_of_values,
    tiled,
    untiled,
)
from bitmill_kernels.trellis.encode import encode_tiles
from bitmill_kernels.trellis.group import emphases
from bitmill_kernels.trellis.layout import RATES, SEAM, tile_bytes
from cuda_on_host import FOLDER, address, host_library

CALL = """
extern "C" void encode_{rate}(float* block, const float* steps, const float* emphasis,
                              const float* upper, int stride, const float* inverses, float* missed,
                              const int* rows, int count, int columns, int seam,
                              uint32_t* history, uint8_t* circles) {{
  launch({{(count + 2 * {pairs} - 1) / (2 * {pairs})}}, Shape<{B}, {V}>::kThreads, [=] {{
    encode<{B}, {V}, {pairs}>(block, steps, emphasis, upper, stride, inverses, missed, rows, count,
                              columns, seam, history, circles);
  }});
}}
"""
CASES = {4: 2, 8: 2}
"""Pairs of tiles a block, by rate: those whose blocks have the fewest threads."""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernel as a library of the host, without what launches it on a GPU."""
    source = (FOLDER / "viterbi_cuda.cu").read_text()
    kernel = source[: source.index("struct Call {")]
    kernel = kernel.replace("__host__ ", "").replace(
        "extern __shared__ uint32_t memory[];", "uint32_t* memory = dynamic_shared.data();"
    )
    calls = "".join(
        CALL.format(rate=rate, pairs=pairs, B=rate * (1 + (rate < 5)), V=1 + (rate < 5))
        for rate, pairs in CASES.items()
    )
    return host_library(kernel, calls, tmp_path_factory.mktemp("host"))


@pytest.mark.parametrize(("rate", "pairs"), CASES.items())
def test_every_column_has_good_circles_for_what_earlier_ones_left(library, rate, pairs):
    draw = torch.Generator().manual_seed(rate)
    rows, columns = 80, 23
    W = torch.randn(rows, columns, generator=draw) * DEVIATION[rate]
    step = 0.5 + torch.rand(rows, generator=draw)
    step[2] = 0
    W *= step[:, None]
    emphasis = emphases(torch.rand(rows, generator=draw) ** 3)
    upper = torch.eye(32) + 0.2 * torch.randn(32, 32, generator=draw).triu(1)
    upper[columns:] = torch.eye(32)[columns:]
    inverses = torch.stack([upper[part, part].inverse() for part in (slice(0, 16), slice(16, 32))])
    own = upper[:columns, :columns].contiguous()
    tiles = torch.tensor([4, 0, 3], dtype=torch.int32)
    circles = torch.zeros(len(tiles), 2, tile_bytes(rate), dtype=torch.uint8)
    history = torch.empty(pairs * 4 * 256 * 256, dtype=torch.uint8)
    block, missed = W.clone(), torch.full_like(W, torch.nan)
    getattr(library, f"encode_{rate}")(
        *(address(block), address(step), address(emphasis), address(own), columns),
        *(address(inverses), address(missed), address(tiles), len(tiles), columns, SEAM[rate]),
        *(address(history), address(circles)),
    )
    at = torch.cat([torch.arange(16 * int(i), 16 * int(i) + 16) for i in tiles])
    others = [row for row in range(rows) if row not in at.tolist()]
    assert torch.equal(block[others], W[others])
    assert missed[others].isnan().all()
    left, of_tiles = W[at], emphasis[at].view(-1, 16)
    counts = of_tiles[:, row_of_values(W.device)]
    for b, part in enumerate((slice(0, 16), slice(16, columns))):
        width = part.stop - part.start
        wanted = left[:, part] * torch.where(step[at] > 0, 1 / step[at], 0.0)[:, None]
        x = in_sequence(tiled(functional.pad(wanted, (0, 16 - width)))).flatten(0, 1)
        errors = [
            (counts * (in_sequence(decode_tiles(found, rate)).float() - x)).square().mean(1)
            for found in (
                circles[:, b],
                encode_tiles(x, rate, of_tiles),
                encode_tiles(x, rate),
            )
        ]
        assert (errors[0] < 1.02 * errors[1]).all()
        assert errors[0].mean() < 0.8 * errors[2].mean()
        values = untiled(decode_tiles(circles[:, b], rate)[:, None]).float()[:, :width]
        lost = (left[:, part] - values * step[at, None]) @ inverses[b, :width, :width]
        torch.testing.assert_close(missed[at][:, part], lost, atol=2e-5, rtol=1e-4)
        left[:, part.stop :] -= lost @ upper[part, part.stop : columns]
    torch.testing.assert_close(block[at][:, 16:], left[:, 16:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("tiles", [1, 36, 256, 768, 1376, 3584])
def test_as_many_tiles_go_together_as_keep_all_processors_busy(tiles):
    for rate in RATES:
        kept = 1 << 16 - rate * (1 + (rate < 5))
        pairs = group_cuda.pairs_together(tiles, rate, kept, 132)
        assert pairs in group_cuda.PAIRS.get(rate, group_cuda.MORE_PAIRS)
    assert group_cuda.pairs_together(256, 3, 1024, 132) == 1
    assert group_cuda.pairs_together(768, 3, 1024, 132) == 3
    assert group_cuda.pairs_together(1376, 3, 1024, 132) == 6
    assert group_cuda.pairs_together(1376, 4, 256, 132) == 3
