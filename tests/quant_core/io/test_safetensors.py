"""Hostile and damaged files are refused quickly, by name; written ones are the library's own."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from bitmill.errors import InputError, ModelError
from bitmill.io import safetensors as module
from bitmill.io.safetensors import (
    MAX_HEADER,
    METADATA,
    ShardWriter,
    TensorInfo,
    checkpoint_bytes,
    file_pieces,
    header_bytes,
    read_header,
    read_headers,
)
from pace import limit


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
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry()}, 8, "not an object of texts"),
    "metadata of another type": ({"__metadata__": True, "a": entry()}, 8, "not an object of texts"),
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
    monkeypatch.setattr(module, "MAX_TENSORS", 100)
    empty = entry("U8", [0], [0, 0])
    path = write(tmp_path / "model.safetensors", {f"t{i}": empty for i in range(100)}, 0)
    assert len(read_header(path)) == 100
    path = write(tmp_path / "model.safetensors", {f"t{i}": empty for i in range(101)}, 0)
    with pytest.raises(ModelError, match="101 tensors, the limit is 100"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ('{"a":[' + "[]," * 2_000_000 + "[]]}", "6?[,0-9]* lists, objects and commas, the limit"),
        ('{"a":[' + "0," * 3_000_000 + "0]}", "lists, objects and commas, the limit"),
        ("{" + ",".join(f'"t{i}":0' for i in range(400_000)) + ',"t9":1}', "'t9' appears twice"),
    ],
    ids=["empty lists", "numbers", "a name again after 400,000 others"],
)
def test_headers_that_would_take_memory_or_time_are_refused(
    tmp_path: Path, header: str, problem: str
) -> None:
    path = write(tmp_path / "model.safetensors", header, 0)
    started = time.process_time()
    with pytest.raises(ModelError, match=problem):
        read_header(path)
    assert time.process_time() - started < limit(5)


def test_an_empty_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelError, match="weight_map is empty"):
        read_headers(tmp_path)


def test_an_index_of_too_many_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"a":[' + "[]," * 500_000 + "[]]}")
    with pytest.raises(ModelError, match=r"index.*1,000,003 lists, objects and commas, the limit"):
        read_headers(tmp_path)


def test_what_is_written_can_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shard holds more tensors than a reader takes."""
    monkeypatch.setattr(module, "MAX_TENSORS", 10)
    tensors = [TensorInfo(f"t{i}", "F16", (2,)) for i in range(25)]
    assert [len(part) for part in module.shard(tensors).values()] == [10, 10, 5]


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


def test_files_of_a_model_are_chosen_as_transformers_chooses(tmp_path: Path) -> None:
    """A single file comes before an index, whatever lies beside it; without both nothing does."""
    shard(tmp_path, "model-1.safetensors", "old")
    shard(tmp_path, "other.safetensors", "a")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor .*model-1\.s") as caught:
        read_headers(tmp_path)
    assert caught.value.code == "missing_file"
    index(tmp_path, {"old": "model-1.safetensors"})
    assert list(read_headers(tmp_path)) == ["old"]
    shard(tmp_path, "model.safetensors", "new")
    assert list(read_headers(tmp_path)) == ["new"]
    index(tmp_path, {"old": "model-7.safetensors"})
    assert list(read_headers(tmp_path)) == ["new"]
    (tmp_path / module.INDEX_NAME).write_text("{")
    assert list(read_headers(tmp_path)) == ["new"]


DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}


def info(name: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(name, DTYPES[tensor.dtype], tuple(tensor.shape))


@pytest.mark.parametrize("count", [1, 3, 17])
def test_bytes_equal_the_written_file(tmp_path: Path, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    tensors: dict[str, torch.Tensor] = {}
    for i in range(count):
        for j, dtype in enumerate(DTYPES):
            shape = torch.randint(1, 60, (1 + (i + j) % 3,), generator=generator).tolist()
            tensors[f"block.{i}.t{(7 * j) % 10}"] = torch.zeros(shape, dtype=dtype)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata=METADATA)
    specs = [info(name, tensor) for name, tensor in tensors.items()]
    assert checkpoint_bytes(specs) == path.stat().st_size
    raw = path.read_bytes()
    assert header_bytes(specs) == 8 + int.from_bytes(raw[:8], "little")


def test_odd_names_and_scalars_are_counted() -> None:
    names = ["plain", 'quo"te', "back\\slash", "ümlaut", "tab\t", ""]
    for shape in ((), (3, 40), (0,)):
        tensors = [TensorInfo(name, "F32", shape) for name in names]
        assert header_bytes(tensors) == len(module.header(tensors)[0])
        assert [header_bytes([t]) for t in tensors] == [len(module.header([t])[0]) for t in tensors]


def test_shards_keep_the_order_and_the_limit() -> None:
    tensors = [TensorInfo(f"t{i}", "U8", (40,)) for i in range(5)] + [
        TensorInfo("big", "F32", (99,))
    ]
    parts = module.shard(tensors, 100)
    assert list(parts) == [f"model-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [t.name for part in parts.values() for t in part] == [t.name for t in tensors]
    assert [len(part) for part in parts.values()] == [2, 2, 1, 1]
    assert list(module.shard(tensors, 10**6)) == ["model.safetensors"]


def test_a_name_that_stands_twice_is_refused() -> None:
    with pytest.raises(InputError, match="'a' stands twice"):
        checkpoint_bytes([TensorInfo("a", "U8", (1,)), TensorInfo("a", "U8", (1,))])


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Out of the order in which a file holds them."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(0, 9, shape, generator=generator).to(dtype)
        for name, dtype, shape in (
            ("late", torch.uint8, (40,)),
            ("wide", torch.float32, (7, 9)),
            ("early", torch.uint8, (3, 5)),
            ("empty", torch.int32, (0, 4)),
            ("half", torch.bfloat16, (11,)),
        )
    }


def data(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def test_pieces_are_the_librarys_file(tensors: dict[str, torch.Tensor]) -> None:
    infos = [info(name, tensor) for name, tensor in tensors.items()]
    pieces = file_pieces(infos, {name: data(tensor) for name, tensor in tensors.items()})
    assert b"".join(pieces) == save(tensors, METADATA)


def test_a_folder_is_written_in_any_order_by_any_thread(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    infos = [info(name, tensor) for name, tensor in tensors.items()]
    with ShardWriter(tmp_path, infos) as writer, ThreadPoolExecutor(4) as pool:
        for name in reversed(tensors):
            pool.submit(writer.write, name, data(tensors[name]))
    writer.write_index(tensors)
    assert [path.name for path in tmp_path.iterdir()] == [module.SINGLE_FILE]
    assert (tmp_path / module.SINGLE_FILE).read_bytes() == save(tensors, METADATA)


def test_shards_have_an_index_in_the_order_asked_for(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    infos = [info(name, tensor) for name, tensor in tensors.items()]
    with ShardWriter(tmp_path, infos, max_bytes=60) as writer:
        for name, tensor in tensors.items():
            writer.write(name, data(tensor))
    writer.write_index(sorted(tensors))
    found = json.loads((tmp_path / module.INDEX_NAME).read_text())
    assert found["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    assert list(found["weight_map"]) == sorted(tensors)
    assert len(set(found["weight_map"].values())) == 3
    for file in set(found["weight_map"].values()):
        own = {name: tensors[name] for name, place in found["weight_map"].items() if place == file}
        assert (tmp_path / file).read_bytes() == save(own, METADATA)
    assert read_headers(tmp_path).keys() == tensors.keys()


def test_a_write_that_the_system_takes_in_parts_is_finished(
    tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:10], offset))
    with ShardWriter(tmp_path, [info(name, tensor) for name, tensor in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, data(tensor))
    assert (tmp_path / module.SINGLE_FILE).read_bytes() == save(tensors, METADATA)
