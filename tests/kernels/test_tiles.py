"""The table of launch shapes: what is read of it, what is refused, how records get into it."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from bitmill_kernels.matmul import tiles
from bitmill_kernels.matmul.decode_cuda import DecodeShape
from bitmill_kernels.matmul.decode_triton import Tile
from bitmill_kernels.matmul.dequantize_triton import RULE, DequantizeTile
from bitmill_kernels.matmul.runtime import build_runtime
from kernel_cases import random_planes

CPU = torch.device("cpu")
CARD = "a card that was measured"
SHARED = 228 * 1024
CASE = {"gpu": CARD, "N": 512, "K": 1024, "widths": "234"}


def stored(**kernels):
    empty = {"decode_cuda": [], "decode_triton": [], "dequantize_triton": []}
    return {"schema_version": tiles.TABLE_VERSION} | empty | kernels


def table_of(folder, **kernels):
    file = folder / "tiles.json"
    file.write_text(json.dumps(stored(**kernels)))
    return tiles.read_table(file)


@pytest.fixture
def weight():
    return build_runtime([random_planes(512, 1024, (3, 2, 4, 3) * 2, CPU)], CPU)


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script of `benchmarks/`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


def test_triton_takes_what_was_measured_on_its_own_gpu_and_else_the_rule(weight, tmp_path):
    table = table_of(
        tmp_path,
        decode_triton=[
            CASE | {"tokens": 8, "shape": [64, 2, 2, 4]},
            CASE | {"tokens": 32, "shape": [32, 1, 4, 2]},
        ],
        dequantize_triton=[CASE | {"shape": [16, 8]}],
    )
    rule = tiles.triton_rule(weight, 10)
    assert tiles.triton_tiles(weight, CARD, 10, table) == {
        8: Tile(64, 2, 2, 4),
        16: rule[16],
        32: Tile(32, 1, 4, 2),
        64: rule[64],
    }
    assert tiles.dequantize_tile(weight, CARD, table) == DequantizeTile(16, 8)
    assert tiles.triton_tiles(weight, "another", 10, table) == rule
    assert tiles.dequantize_tile(weight, "another", table) == RULE
    wider = build_runtime([random_planes(512, 1024, (3, 2, 4, 8) * 2, CPU)], CPU)
    assert tiles.triton_tiles(wider, CARD, 10, table) == tiles.triton_rule(wider, 10)


@pytest.mark.parametrize("shape", [[256, 2, 4, 3], [128, 5, 4, 3]], ids=["rows", "slices"])
def test_a_measured_tile_that_does_not_suit_a_stack_gives_way_to_the_rule(shape, tmp_path):
    """As N, K and widths say nothing of the rows and pairs of single linears."""
    parts = [random_planes(N, 1024, (3, 2, 4, 3) * 2, CPU) for N in (384, 128)]
    stack = build_runtime(parts, CPU)
    table = table_of(tmp_path, decode_triton=[CASE | {"tokens": 16, "shape": shape}])
    assert len(table.decode_triton) == 1
    assert tiles.triton_tiles(stack, CARD, 10, table) == tiles.triton_rule(stack, 10)


def test_blocks_may_be_kept_from_converting(weight, tmp_path):
    entries = [
        CASE | {"tokens": 2, "shape": [4, 1, 4], "fused": 1},
        CASE | {"tokens": 8, "shape": [4, 1, 4]},
    ]
    found = tiles.block_shapes(weight, CARD, SHARED, table_of(tmp_path, decode_cuda=entries))
    assert found[2] == DecodeShape(4, 1, 4, fused=1)
    assert found[8] == DecodeShape(4, 1, 4)


@pytest.mark.parametrize(
    ("kernel", "entry", "reason"),
    [
        ("decode_triton", {"tokens": 16, "shape": [48, 1, 4, 3]}, "rows must be one of"),
        ("decode_triton", {"tokens": 16, "shape": [64, 1, 3, 3]}, "warps one of"),
        ("decode_triton", {"tokens": 16, "shape": [64, 0, 4, 3]}, "split must be 1 or more"),
        ("decode_triton", {"tokens": 16, "shape": [64, 1, 4, 9]}, "stages 1 to 8"),
        ("decode_triton", {"tokens": 16, "shape": [64, 1, 4, 0]}, "stages 1 to 8"),
        ("decode_cuda", {"tokens": 2, "shape": [4, 1, 4], "fused": 9}, "0 to 8 tokens"),
        ("decode_triton", {"tokens": 24, "shape": [64, 1, 4, 3]}, "tokens must be one of"),
        ("decode_triton", {"tokens": 16, "shape": [64, 1, 4]}, "not enough values"),
        ("dequantize_triton", {"shape": [256, 4]}, "rows must be one of"),
        ("dequantize_triton", {"shape": [64, 5]}, "warps one of"),
        ("dequantize_triton", {"shape": [64]}, "not enough values"),
        ("decode_cuda", {"tokens": 2, "shape": [4, 2, 2]}, "shapes compiled for 2 tokens are"),
        ("decode_cuda", {"tokens": 4, "shape": [4, 2, 3]}, "shapes compiled for 4 tokens are"),
    ],
)
def test_shapes_that_cannot_be_are_refused_by_their_case(kernel, entry, reason, tmp_path):
    with pytest.raises(ValueError, match=reason) as caught:
        table_of(tmp_path, **{kernel: [CASE | entry]})
    assert f"launch shape {entry['shape']}" in str(caught.value)
    assert CARD in str(caught.value)


def test_a_table_of_another_version_is_refused(tmp_path):
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(stored() | {"schema_version": 1}))
    with pytest.raises(ValueError, match="version 1: this code reads 2"):
        tiles.read_table(file)


def test_a_record_replaces_the_entries_of_its_cases_and_no_others(benchmark, tmp_path):
    other = CASE | {"gpu": "another", "tokens": 8, "shape": [64, 2, 2, 4]}
    before = [CASE | {"tokens": tokens, "shape": [128, 1, 4, 3]} for tokens in (8, 16, 32)]
    cuda = [CASE | {"tokens": 2, "shape": [4, 1, 4]}]
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(stored(decode_triton=[*before, other], decode_cuda=cuda)))
    new = [
        CASE | {"tokens": 8, "shape": [64, 1, 4, 3]},
        CASE | {"tokens": 16, "shape": None},
        CASE | {"tokens": 64, "shape": [32, 1, 4, 2]},
    ]
    benchmark("matmul_tiles").merge({"decode_triton": new}, file)
    found = json.loads(file.read_text())
    assert found == stored(decode_triton=[new[0], before[2], new[2], other], decode_cuda=cuda)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"decode_triton": [CASE | {"tokens": 8, "shape": [48, 1, 4, 3]}]}, "rows must be"),
        ({"trellis": []}, r"settings are of \['trellis'\]: the kernels are"),
    ],
)
def test_a_record_of_shapes_that_cannot_be_leaves_the_table_as_it_was(
    settings, reason, benchmark, tmp_path
):
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(stored()))
    with pytest.raises(ValueError, match=reason):
        benchmark("matmul_tiles").merge(settings, file)
    assert json.loads(file.read_text()) == stored()


def test_the_stored_table_is_written_as_records_write_it(benchmark):
    text = tiles.STORED.read_text()
    assert benchmark("matmul_tiles").text(json.loads(text)) == text


def sweep_row(shape, tokens, converts, microseconds, case="4096x4096 4-bit"):
    found = {"case": case, "tokens": tokens, "microseconds": microseconds}
    found |= {"N": 4096, "K": 4096, "widths": "4"}
    return found | {"shape": shape, "converts": converts}


ONE, TWO = (8, 2, 1), (4, 1, 4)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(ONE, 1, True, 9), (ONE, 1, False, 8), (TWO, 1, True, 9), (TWO, 1, False, 7)], (TWO, 0)),
        ([(ONE, 1, True, 7), (ONE, 1, False, 8), (TWO, 1, False, 7.5)], (ONE, None)),
        ([(ONE, 1, False, 8), (TWO, 1, False, 7)], (TWO, None)),
        # the tokens of a bucket count together, those that no block converts for both ways
        ([(ONE, 1, True, 5), (ONE, 1, False, 6), (ONE, 2, True, 9), (ONE, 2, False, 7)], (ONE, 1)),
        ([(ONE, 1, True, 7), (ONE, 1, False, 6), (ONE, 2, True, 9), (ONE, 2, False, 7)], (ONE, 0)),
        (
            [
                *((ONE, 3, True, 9), (ONE, 3, False, 7), (ONE, 8, False, 7)),
                *((TWO, 3, False, 8), (TWO, 8, False, 5)),
            ],
            (TWO, None),
        ),
    ],
)
def test_the_fastest_shape_of_a_sweep_says_whether_blocks_convert(rows, expected, benchmark):
    found = benchmark("matmul").fastest_shapes([sweep_row(*one) for one in rows], CARD)
    shape, fused = expected
    case = {"gpu": CARD, "N": 4096, "K": 4096, "widths": "4"}
    case |= {"tokens": 2 if rows[0][1] <= 2 else 8, "shape": list(shape)}
    assert found == [case | ({} if fused is None else {"fused": fused})]


def test_of_cases_that_are_one_to_the_table_the_fastest_counts(benchmark):
    rows = [
        sweep_row(ONE, 16, False, 9, "one"),
        sweep_row(TWO, 16, False, 8, "one"),
        sweep_row(ONE, 16, False, 7, "stacked"),
        sweep_row(TWO, 16, False, 12, "stacked"),
    ]
    found = benchmark("matmul").fastest_shapes(rows, CARD)
    assert [entry["shape"] for entry in found] == [list(ONE)]


def test_the_sweep_has_every_width_alone_and_mixed_on_every_shape_of_the_table(benchmark):
    matmul = benchmark("matmul")
    for N, K in matmul.MATRICES:
        patterns = [
            pattern for rows, columns, (pattern, *_) in matmul.SWEPT.values()
            if (rows, columns) == ([N], K)
        ]  # fmt: skip
        assert {(1,), (2,), (3,), (4,), (5,), (6,), (8,), matmul.MIX} <= set(patterns)
