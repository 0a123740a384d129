"""Cases for Triton's interpreter: `benchmarks/matmul_triton.py` finds shapes, linears take them."""

import importlib
from pathlib import Path

import pytest
import torch

from bitmill_kernels import reference
from bitmill_kernels.matmul import decode_triton, dequantize_triton, tiles
from bitmill_kernels.matmul.decode_triton import Tile
from bitmill_kernels.matmul.dequantize_triton import RULE, DequantizeTile
from bitmill_kernels.matmul.linear import MixedLinear
from bitmill_kernels.matmul.runtime import build_runtime
from kernel_cases import random_linear

CPU = torch.device("cpu")


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    found = importlib.import_module("matmul_triton")
    monkeypatch.setattr(found, "ROWS_AND_WARPS", ((32, 2), (64, 4), (256, 4)))
    monkeypatch.setattr(found, "OTHER_STAGES", (2,))
    monkeypatch.setattr(found, "DEQUANTIZE_TILES", (DequantizeTile(32, 2), DequantizeTile(128, 8)))
    return found


@pytest.fixture
def weights():
    weight, *_ = random_linear(20, 512, (3, 4, 3, 4), seed=1)
    return [build_runtime([weight], CPU)]


def test_the_fastest_tile_is_found_among_neighbours_of_the_first_round(sweep, weights):
    """Times are made up; 32 rows in two stages are reached by way of 32 rows in three."""

    def timer(*calls):
        for call in calls:
            tokens, tile = call.launch
            assert tokens == (16 if tile.rows == 128 else 8)
        return [tile.rows + 8 * tile.stages + tile.split for _, tile in (c.launch for c in calls)]

    rule, best, found = sweep.tune_decode(weights, 3, 2, timer)
    assert rule == (16, tiles.triton_rule(weights[0], 2)[16])
    assert best == (8, Tile(32, 1, 2, 2))
    assert {tile.rows for _, tile in found} == {32, 64, 128}


def test_the_rule_stays_where_nothing_is_faster(sweep, weights):
    rule, best, _ = sweep.tune_decode(
        weights, 16, 2, lambda *calls: [-call.launch[1].rows for call in calls]
    )
    assert best == rule
    dequantize, _ = sweep.tune_dequantize(
        weights, lambda *calls: [float(call.launch != RULE) for call in calls]
    )
    assert dequantize == RULE


def test_a_shape_that_gives_other_values_is_left_out(sweep, weights, monkeypatch, capsys):
    class Wrong(sweep.Decode):
        def __call__(self, i):
            y = super().__call__(i)
            return y.mul_(1.01) if self.launch[1].rows == 32 else y

    monkeypatch.setattr(sweep, "Decode", Wrong)
    _, best, found = sweep.tune_decode(
        weights, 1, 2, lambda *calls: [call.launch[1].rows for call in calls]
    )
    assert {tile.rows for _, tile in found} == {64, 128}
    assert best[1].rows == 64
    assert "left out" in capsys.readouterr().out


def test_a_linear_runs_the_shapes_of_the_table(monkeypatch):
    widths = (3, 4, 2)
    weight, *parts = random_linear(70, 300, widths, seed=1)
    case = ("", 70, 300, "234")
    table = tiles.Table(
        {},
        {(*case, 8): Tile(64, 2, 2, 2), (*case, 16): Tile(32, 1, 4, 2)},
        {(*case, None): DequantizeTile(32, 2)},
    )
    monkeypatch.setattr(tiles, "read_table", lambda: table)
    launched = []
    launch = decode_triton.launch_decode

    def told(weight, tables, *rest, **options):
        launched.append(tables.tile)
        launch(weight, tables, *rest, **options)

    class Told(dequantize_triton.Dequantizer):
        def __init__(self, weight, max_rows, tile):
            super().__init__(weight, max_rows, tile)
            launched.append(tile)

    monkeypatch.setattr(decode_triton, "launch_decode", told)
    monkeypatch.setattr(dequantize_triton, "Dequantizer", Told)
    linear = MixedLinear([weight], CPU, backend="triton")
    for T in (8, 9, 17):
        x = torch.randn(T, 300, generator=torch.Generator().manual_seed(T)).half()
        exact = reference.mixed_matmul(x, *parts, widths)
        assert ((linear(x).double() - exact).norm() / exact.norm()) < 1e-3
    assert launched == [
        DequantizeTile(32, 2),
        Tile(64, 2, 2, 2),
        Tile(32, 1, 4, 2),
        tiles.triton_rule(build_runtime([weight], CPU), 1)[32],
    ]
