"""Stored formats are pinned by bytes: files written by this version and every later one."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

import bitmill
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.formats.packed.checkpoint import PackedCheckpoint
from bitmill.quant.tensors import QuantizedWeight
from golden_model import CONFIG, SHAPES, golden_tensor, golden_weight, write_golden

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS / "golden" / "packed-v1"
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


def test_the_writer_still_writes_these_bytes(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "packed"
    source.mkdir()
    folder.mkdir()
    write_golden(folder, source)
    names = sorted(file.name for file in GOLDEN.iterdir())
    assert sorted(file.name for file in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (GOLDEN / name).read_bytes(), name
    assert hashlib.sha256((GOLDEN / "model.safetensors").read_bytes()).hexdigest() == DIGEST


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


def test_every_width_is_in_the_golden_file() -> None:
    widths = {width for index in range(len(SHAPES)) for width in golden_weight(index).widths}
    assert widths == {1, 2, 3, 4, 5, 6, 8}


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


def test_the_reader_in_the_documentation_reads_the_golden_file() -> None:
    text = (TESTS.parent / "docs" / "format.md").read_text()
    (code,) = re.findall(r"```python\n(import numpy.*?)```", text, flags=re.DOTALL)
    reader: dict[str, Any] = {}
    exec(code, reader)  # noqa: S102
    tensors = load_file(GOLDEN / "model.safetensors")
    linears = json.loads((GOLDEN / "config.json").read_text())["quantization_config"]["linears"]
    for index, shape in enumerate(SHAPES):
        found = reader["read_weight"](tensors, linears[shape.name], shape.name, shape.columns)
        assert found.dtype == np.float32
        assert np.array_equal(found, formula(golden_weight(index), shape.columns)), shape.name


def test_a_stored_map_keeps_its_meaning() -> None:
    path = TESTS / "golden" / "map-v1.json"
    bit_widths = BitWidthMap.load(path)
    assert bit_widths.order == "activation"
    assert bit_widths.linears == {
        shape.name: golden_weight(index).widths for index, shape in enumerate(SHAPES)
    }
    assert bit_widths.to_json() == path.read_text()
