"""Hostile and damaged safetensors files are refused quickly, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bitmill.errors import ModelError
from bitmill.io import safetensors_headers as headers
from bitmill.io.safetensors_headers import MAX_HEADER, read_header, read_headers


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, header: object, data: int = 8) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + bytes(data))
    return path


def test_headers_equal_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.zeros(3, 5, dtype=torch.bfloat16),
        "a.bias": torch.zeros(7),
        "empty": torch.zeros(0, 4, dtype=torch.int32),
        "scalar": torch.zeros((), dtype=torch.float16),
        "flags": torch.zeros(9, dtype=torch.bool),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    found = read_header(path)
    assert set(found) == set(tensors)
    with safe_open(path, framework="pt") as handle:
        for name, header in found.items():
            window = handle.get_slice(name)
            assert header.shape == tuple(window.get_shape())
            assert header.dtype == window.get_dtype()
            assert header.nbytes == tensors[name].nbytes


HOSTILE: dict[str, tuple[object, int, str]] = {
    "not json": ("{'a'", 8, "cannot be read"),
    "not an object": ("[1]", 8, "is a list"),
    "deep nesting": ("[" * 200_000, 0, "cannot be read"),
    "duplicate names": (
        '{"a": {"dtype":"U8","shape":[8],"data_offsets":[0,8]},'
        '"a": {"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
        8,
        "name 'a' appears twice",
    ),
    "duplicate keys inside": (
        '{"a": {"dtype":"U8","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        8,
        "'dtype' appears twice",
    ),
    "unknown dtype": ({"a": entry("F4")}, 8, "dtype F4"),
    "dtype of another type": ({"a": entry(["F32"])}, 8, "has dtype"),
    "wrong size": ({"a": entry(shape=[3])}, 8, "spans 8 bytes, needs 12"),
    "overflowing shape": ({"a": entry(shape=[2**61, 8])}, 8, "needs"),
    "size beyond int64": ({"a": entry(shape=[2**63])}, 8, "has the shape"),
    "negative size": ({"a": entry(shape=[-2])}, 8, "has the shape"),
    "boolean size": ({"a": entry(shape=[True, 2])}, 8, "has the shape"),
    "rank nine": ({"a": entry(shape=[1] * 8 + [2])}, 8, "has the shape"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, 8, "has the offsets"),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, 8, "has the offsets"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, 12, "overlaps"),
    "gap": ({"a": entry(), "b": entry(offsets=[12, 20])}, 20, "leaves a gap"),
    "trailing bytes": ({"a": entry()}, 9, "take 8 bytes, the file has 9"),
    "missing bytes": ({"a": entry()}, 7, "take 8 bytes, the file has 7"),
    "extra key": ({"a": entry() | {"hook": 1}}, 8, "not exactly the keys"),
    "missing key": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "not exactly the keys"),
    "odd name": ({"a\nb": entry()}, 8, "odd characters"),
    "long name": ({"a" * 513: entry()}, 8, "too long"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_refused_with_the_file_name(case: str, tmp_path: Path) -> None:
    header, data, problem = HOSTILE[case]
    path = write(tmp_path / "model-00001-of-00002.safetensors", header, data)
    with pytest.raises(ModelError, match=problem) as caught:
        read_header(path)
    assert caught.value.param == "model-00001-of-00002.safetensors"
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("length", [0, 5, 8, 11])
def test_truncated_file_is_refused(length: int, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", {"a": entry()}).read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole[:length])
    with pytest.raises(ModelError, match="truncated"):
        read_header(path)


def test_oversized_header_is_refused_unread(tmp_path: Path) -> None:
    """A sparse file whose header would be read into memory otherwise."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as handle:
        handle.write((MAX_HEADER + 1).to_bytes(8, "little"))
        handle.truncate(MAX_HEADER + 100)
    with pytest.raises(ModelError, match=f"claims {MAX_HEADER + 1} bytes, the limit"):
        read_header(path)


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "MAX_TENSORS", 100)
    empty = entry("U8", [0], [0, 0])
    path = write(tmp_path / "model.safetensors", {f"t{i}": empty for i in range(100)}, 0)
    assert len(read_header(path)) == 100
    path = write(tmp_path / "model.safetensors", {f"t{i}": empty for i in range(101)}, 0)
    with pytest.raises(ModelError, match="101 tensors, the limit is 100"):
        read_header(path)


def test_the_library_alone_would_accept_duplicates(tmp_path: Path) -> None:
    """Why headers are checked here at all (safetensors 0.8)."""
    header, data, _ = HOSTILE["duplicate names"]
    path = write(tmp_path / "model.safetensors", header, data)
    try:
        with safe_open(path, framework="pt") as handle:
            assert list(handle.keys()) == ["a"]
    except SafetensorError:
        pytest.fail("safetensors now refuses duplicate names itself")


def shard(folder: Path, file: str, *names: str) -> None:
    save_file({name: torch.zeros(2) for name in names}, folder / file)


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    shard(tmp_path, "model-1.safetensors", "a", "b")
    shard(tmp_path, "model-2.safetensors", "c")
    shard(tmp_path, "unrelated.safetensors", "d")
    index(
        tmp_path,
        {"a": "model-1.safetensors", "b": "model-1.safetensors"} | {"c": "model-2.safetensors"},
    )
    assert {name: h.file for name, h in read_headers(tmp_path).items()} == {
        "a": "model-1.safetensors",
        "b": "model-1.safetensors",
        "c": "model-2.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        ({"a": "../outside.safetensors"}, "not a plain name"),
        ({"a": "/etc/passwd"}, "not a plain name"),
        ({"a": "sub/model-1.safetensors"}, "not a plain name"),
        ({"a": "model-1.bin"}, "not a plain name"),
        ({"a": 3}, "not a plain name"),
        ({"a": "model-9.safetensors"}, "missing"),
        ({"z": "model-1.safetensors"}, "which has it not"),
        (["a"], "no readable weight_map"),
    ],
)
def test_bad_index_is_refused(weight_map: object, problem: str, tmp_path: Path) -> None:
    shard(tmp_path, "model-1.safetensors", "a")
    index(tmp_path, weight_map)
    with pytest.raises(ModelError, match=problem):
        read_headers(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shard(tmp_path, "model-1.safetensors", "a")
    shard(tmp_path, "model-2.safetensors", "a", "b")
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(ModelError, match=r"a is also in model-1\.safetensors"):
        read_headers(tmp_path)
