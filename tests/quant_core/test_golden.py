"""Stored formats are pinned by bytes: files written by this version and every later one."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

import bitmill
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.formats.packed.checkpoint import PackedCheckpoint
from bitmill.quant.tensors import QuantizedWeight
from golden_model import (
    CONFIG,
    EMBEDDING,
    OUTLIERS,
    SHAPES,
    golden_embedding,
    golden_kept,
    golden_tensor,
    golden_trellis,
    golden_weight,
    write_golden,
)
from weights import random_weight

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS / "golden" / "packed-v1"
GOLDEN_2 = TESTS / "golden" / "packed-v2"
GOLDEN_3 = TESTS / "golden" / "packed-v3"
GOLDEN_4 = TESTS / "golden" / "packed-v4"
DIGEST_4 = "f2ade702a080d02b41b6f038155357b8bc77454e4c01474fb40f1a38182f7d0e"
DIGEST_3 = "eab0f960b7f5b95877b61b77bdda184602c5aaaab8b52142667ce215b08708eb"
DIGEST_2 = "fd4d058afccb724e1b3711cab2f77d74b7031196a570dafaf4bf89499a5432fc"
DIGEST = "9d00d3f3239e73f100707caaa12851a9912a5688a4c3810072905cc17d94666b"


def formula(weight: QuantizedWeight, K: int) -> np.ndarray[Any, Any]:
    """Weight by the format's equation, column by column."""
    out = np.empty((weight.N, K), np.float32)
    for k in range(K):
        group = k // 128
        zero = weight.zeros[group].numpy() / (8 if weight.widths[group] == 1 else 1)
        column = weight.scales[group].float().numpy() * (weight.codes[:, k].numpy() - zero)
        out[:, k if weight.order is None else int(weight.order[k])] = column
    return out


@pytest.mark.parametrize(
    ("code", "golden", "digest"),
    [
        ("affine", GOLDEN, DIGEST),
        ("trellis", GOLDEN_2, DIGEST_2),
        ("outliers", GOLDEN_3, DIGEST_3),
        ("mixed", GOLDEN_4, DIGEST_4),
    ],
)
def test_the_writer_still_writes_these_bytes(
    tmp_path: Path, code: str, golden: Path, digest: str
) -> None:
    source, folder = tmp_path / "source", tmp_path / "packed"
    source.mkdir()
    folder.mkdir()
    write_golden(folder, source, code)
    names = sorted(file.name for file in golden.iterdir())
    assert sorted(file.name for file in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (golden / name).read_bytes(), name
    assert hashlib.sha256((golden / "model.safetensors").read_bytes()).hexdigest() == digest


def test_the_reader_still_reads_them() -> None:
    checkpoint = PackedCheckpoint.open(GOLDEN)
    checkpoint.check_linears(SHAPES)
    for index, shape in enumerate(SHAPES):
        found, expected = checkpoint.linear(shape).unpack(), golden_weight(index)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)
        assert torch.equal(found.zeros, expected.zeros)
        assert (found.order is None) == (expected.order is None)
        if found.order is not None and expected.order is not None:
            assert torch.equal(found.order, expected.order)
    name = "model.norm.weight"
    assert torch.equal(checkpoint.tensor(name), golden_tensor(name))


def test_the_reader_still_reads_trellis_codes() -> None:
    checkpoint = PackedCheckpoint.open(GOLDEN_2)
    checkpoint.check_linears(SHAPES)
    assert {rate for index in range(len(SHAPES)) for rate in golden_trellis(index).widths} == {
        *range(1, 9)
    }
    for index, shape in enumerate(SHAPES):
        found, expected = checkpoint.linear(shape).unpack(), golden_trellis(index)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.dequantize(), expected.dequantize())


def test_every_width_is_in_the_golden_file() -> None:
    widths = {width for index in range(len(SHAPES)) for width in golden_weight(index).widths}
    assert widths == {1, 2, 3, 4, 5, 6, 8}


def test_transformers_computes_with_trellis_codes() -> None:
    model = bitmill.load(GOLDEN_2, dtype=torch.float32)
    for index, shape in enumerate(SHAPES):
        x = torch.linspace(-1, 1, shape.columns)[None]
        expected = x.double() @ golden_trellis(index).dequantize().double().t()
        found = model.get_submodule(shape.name)(x).double()
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_transformers_computes_with_these_weights() -> None:
    model = bitmill.load(GOLDEN, dtype=torch.float32)
    assert model.config.hidden_size == CONFIG["hidden_size"]
    for index, shape in enumerate(SHAPES):
        x = torch.linspace(-1, 1, shape.columns)[None]
        expected = (
            x.double() @ torch.from_numpy(formula(golden_weight(index), shape.columns)).double().t()
        )
        found = model.get_submodule(shape.name)(x).double()
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def documented_reader(version: int) -> dict[str, Any]:
    text = (TESTS.parent / "docs" / "format.md").read_text()
    found = re.findall(r"```python\n(import numpy.*?)```", text, flags=re.DOTALL)
    reader: dict[str, Any] = {}
    exec(found[version - 1], reader)  # noqa: S102
    return reader


def test_the_second_reader_in_the_documentation_reads_the_golden_file() -> None:
    reader, tensors = documented_reader(2), load_file(GOLDEN_2 / "model.safetensors")
    config = json.loads((GOLDEN_2 / "config.json").read_text())["quantization_config"]
    text = (TESTS.parent / "docs" / "format.md").read_text()
    (said,) = re.findall(r'"code": (\{.*?\})', text, flags=re.DOTALL)
    assert json.loads(said) == config["code"]
    for index, shape in enumerate(SHAPES):
        linear = config["linears"][shape.name]
        found = reader["read_weight"](tensors, linear, shape.name, shape.columns)
        expected = golden_trellis(index).dequantize().numpy()
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=shape.name)


def test_the_reader_in_the_documentation_reads_the_golden_file() -> None:
    reader = documented_reader(1)
    tensors = load_file(GOLDEN / "model.safetensors")
    linears = json.loads((GOLDEN / "config.json").read_text())["quantization_config"]["linears"]
    for index, shape in enumerate(SHAPES):
        size = shape.rows, shape.columns
        found = reader["read_weight"](tensors, linears[shape.name], shape.name, *size)
        assert found.dtype == np.float32
        assert np.array_equal(found, formula(golden_weight(index), shape.columns)), shape.name


def test_outliers_are_read_back_by_us_by_transformers_and_by_the_documented_reader() -> None:
    checkpoint, model = PackedCheckpoint.open(GOLDEN_3), bitmill.load(GOLDEN_3, dtype=torch.float32)
    checkpoint.check_linears(SHAPES)
    assert checkpoint.bit_widths.outliers == OUTLIERS
    config = json.loads((GOLDEN_3 / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    reader, tensors = documented_reader(1), load_file(GOLDEN_3 / "model.safetensors")
    for index, shape in enumerate(SHAPES):
        plain, count = formula(golden_weight(index), shape.columns), OUTLIERS.get(shape.name, 0)
        expected = golden_kept(index).dequantize().numpy()
        assert (np.abs(expected - plain).max(0) > 0).sum() == count
        assert torch.equal(checkpoint.weight(shape), torch.from_numpy(expected))
        size, linear = (shape.rows, shape.columns), config["linears"][shape.name]
        found = reader["read_weight"](tensors, linear, shape.name, *size)
        np.testing.assert_array_equal(found, expected, shape.name)
        x = torch.linspace(-1, 1, shape.columns)[None]
        y = x.double() @ torch.from_numpy(expected).double().t()
        assert (model.get_submodule(shape.name)(x).double() - y).norm() <= 1e-5 * y.norm()


def test_a_packed_embedding_beside_trellis_codes_is_read_back_by_all_readers() -> None:
    checkpoint, model = PackedCheckpoint.open(GOLDEN_4), bitmill.load(GOLDEN_4, dtype=torch.float32)
    checkpoint.check_linears([*SHAPES, EMBEDDING])
    config = json.loads((GOLDEN_4 / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 4
    linears, tensors = config["linears"], load_file(GOLDEN_4 / "model.safetensors")
    name, size = EMBEDDING.name, (EMBEDDING.rows, EMBEDDING.columns)
    expected = formula(golden_embedding(), EMBEDDING.columns)
    read = documented_reader(1)["read_weight"]
    assert np.array_equal(read(tensors, linears[name], name, *size), expected)
    assert torch.equal(checkpoint.weight(EMBEDDING), torch.from_numpy(expected))
    rows = model.get_input_embeddings()(torch.arange(EMBEDDING.rows))
    assert torch.equal(rows, torch.from_numpy(expected))
    read = documented_reader(2)["read_weight"]
    for index, shape in enumerate(SHAPES):
        found = golden_trellis(index).dequantize()
        assert torch.equal(checkpoint.weight(shape), found)
        again = read(tensors, linears[shape.name], shape.name, shape.columns)
        np.testing.assert_allclose(again, found.numpy(), atol=2e-6, err_msg=shape.name)


@pytest.mark.parametrize(
    ("widths", "digest"),
    [("0302", "68a257563a84cf09"), ("1000", "f3a898ef0eed4c47"), ("0000", "9bbcbf73561f6bc5")],
)
def test_dropped_groups_keep_their_bytes_and_are_read_as_zeros(widths: str, digest: str) -> None:
    N, K = 5, 400
    weight = random_weight(N, K, tuple(map(int, widths)), ordered=True)
    tensors = {name: t.numpy() for name, t in weight.pack().tensors("a").items()}
    assert hashlib.sha256(save(tensors)).hexdigest()[:16] == digest
    assert weight.order is not None
    stored, linear = tensors | {"a.order": weight.order.numpy()}, {"order": "a.order"}
    found = documented_reader(1)["read_weight"](stored, linear | {"widths": widths}, "a", N, K)
    assert np.array_equal(found, formula(weight, K))
    assert (found.any(0).sum() > 0) == (widths != "0000")


def test_a_stored_map_keeps_its_meaning() -> None:
    path = TESTS / "golden" / "map-v1.json"
    bit_widths = BitWidthMap.load(path)
    assert bit_widths.order == "activation"
    assert bit_widths.linears == {
        shape.name: golden_weight(index).widths for index, shape in enumerate(SHAPES)
    }
    assert bit_widths.to_json() == path.read_text()
