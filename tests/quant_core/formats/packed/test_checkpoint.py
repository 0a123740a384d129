"""A packed folder has the predicted bytes and reads back exactly; damage is refused by name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmill.config.quantization import Allocation, Budget, QuantizationConfig
from bitmill.errors import BitmillError, Cancelled, FormatError, ModelError, ResourceError
from bitmill.formats import writing as writing_module
from bitmill.formats.accounting import checkpoint_tensors
from bitmill.formats.format import order_owners
from bitmill.formats.packed.checkpoint import PackedCheckpoint, write_checkpoint
from bitmill.formats.writing import tensor_bytes
from bitmill.io import atomic as storage
from bitmill.io import safetensors as safetensors_module
from bitmill.io.atomic import Flusher
from bitmill.io.safetensors import INDEX_NAME, checkpoint_bytes
from bitmill.plan.model_plan import make_plan
from bitmill.quant.tensors import QuantizedWeight
from rank_function import in_process
from tiny import tiny_llama, tiny_opt
from trellis_models import pack_trellis
from weights import PackedModel, pack_model

EMBEDDING = "model.embed_tokens"
QUERY = "model.layers.0.self_attn.q_proj"
KEY = "model.layers.0.self_attn.k_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return pack_model(source, tmp_path_factory.mktemp("packed"), order="activation")


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    orders = (a.order, b.order)
    if a.order is None or b.order is None:
        same_order = orders == (None, None)
    else:
        same_order = torch.equal(a.order, b.order)
    pairs = ((a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros))
    return a.widths == b.widths and same_order and all(torch.equal(x, y) for x, y in pairs)


def test_every_linear_reads_back_exactly(packed: PackedModel) -> None:
    checkpoint = PackedCheckpoint.open(packed.folder)
    checkpoint.check_linears(packed.plan.shapes)
    assert len(packed.plan.shapes) == 14
    for shape in packed.plan.shapes:
        found = checkpoint.linear(shape).unpack()
        assert same(found, packed.weights[shape.name])
        assert (found.order is None) == (shape.name in packed.plan.feeders)
    assert PackedCheckpoint.open(packed.folder).bit_widths == packed.map


def test_other_tensors_are_taken_over_and_the_tied_head_is_stored_once(
    packed: PackedModel, source: Path
) -> None:
    stored = load_file(packed.folder / "model.safetensors")
    original = load_file(source / "model.safetensors")
    kept = {name for name in original if not name.endswith("_proj.weight")}
    assert "lm_head.weight" not in stored
    assert "model.embed_tokens.weight" in kept
    for name in kept:
        assert torch.equal(stored[name], original[name])
        assert stored[name].dtype == original[name].dtype


def test_the_file_has_the_bytes_that_were_predicted(packed: PackedModel) -> None:
    specs = checkpoint_tensors(packed.plan, packed.map.linears, "activation")
    assert PackedCheckpoint.open(packed.folder).file_bytes == checkpoint_bytes(specs)


def test_the_file_is_what_the_safetensors_library_writes(packed: PackedModel) -> None:
    file = packed.folder / "model.safetensors"
    expected = safetensors.torch.save(load_file(file), metadata={"format": "pt"})
    assert file.read_bytes() == expected


def test_writing_twice_gives_the_same_bytes(
    packed: PackedModel, source: Path, tmp_path: Path
) -> None:
    again = pack_model(source, tmp_path / "again", order="activation")
    for file in sorted(packed.folder.iterdir()):
        assert (again.folder / file.name).read_bytes() == file.read_bytes(), file.name
    assert list(again.tensor_hashes.items()) == list(packed.tensor_hashes.items())


def test_linears_are_told_in_order_and_a_caller_that_stops_leaves_no_thread(
    packed: PackedModel, source: Path, tmp_path: Path
) -> None:
    told: list[str] = []

    def on_linear(name: str) -> None:
        told.append(name)
        if len(told) == 3:
            raise Cancelled("stop")

    before = set(threading.enumerate())
    with pytest.raises(Cancelled):
        pack_model(source, tmp_path, order="activation", on_linear=on_linear)
    assert set(threading.enumerate()) == before
    assert told == list(packed.map.linears)[:3]


def test_tensors_are_written_one_at_a_time_and_hashed_meanwhile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, writing = threading.Semaphore(0), threading.Lock()

    def sha256(data: memoryview) -> Any:
        begun.release()
        return hashlib.sha256(data)

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        assert writing.acquire(blocking=False)
        assert offset == 0 or begun.acquire(timeout=60)
        count = write(file, data, offset)
        writing.release()
        return count

    write = os.pwrite
    monkeypatch.setattr(writing_module, "hashlib", SimpleNamespace(sha256=sha256))
    monkeypatch.setattr(os, "pwrite", pwrite)
    packed = pack_model(source, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    hashes = {k: hashlib.sha256(tensor_bytes(t)).hexdigest() for k, t in stored.items()}
    assert packed.tensor_hashes == hashes


def test_a_file_that_cannot_be_flushed_while_it_is_written_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EDQUOT, "quota exceeded")

    monkeypatch.setattr(safetensors_module, "Flusher", partial(Flusher, 1))
    monkeypatch.setattr(storage, "os", SimpleNamespace(fsync=fsync))
    with pytest.raises(ResourceError, match="no space is left"):
        pack_model(source, tmp_path)


def test_shards_hold_the_same_tensors_and_have_an_index(
    packed: PackedModel, source: Path, tmp_path: Path
) -> None:
    limit = 60_000
    sharded = pack_model(source, tmp_path / "sharded", order="activation", max_shard_bytes=limit)
    files = sorted(tmp_path.glob("sharded/*.safetensors"))
    whole = load_file(packed.folder / "model.safetensors")
    parts = [load_file(file) for file in files]
    assert len(files) > 3
    assert sum(len(part) for part in parts) == len(whole)
    for part in parts:
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= limit
        assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())
    index = json.loads((sharded.folder / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert {n: str(f.name) for f, p in zip(files, parts, strict=True) for n in p} == index[
        "weight_map"
    ]
    specs = checkpoint_tensors(packed.plan, packed.map.linears, "activation")
    checkpoint = PackedCheckpoint.open(sharded.folder)
    assert checkpoint.file_bytes == checkpoint_bytes(specs, limit)
    shape = packed.plan.shapes[-1]
    assert same(checkpoint.linear(shape).unpack(), packed.weights[shape.name])


def test_the_config_names_widths_and_orders(packed: PackedModel, source: Path) -> None:
    config = json.loads((packed.folder / "config.json").read_text())
    stored = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert (stored["quant_method"], stored["format_version"]) == ("bitmill", 1)
    assert stored["linears"][KEY] == {
        "widths": "".join(map(str, packed.map.linears[KEY])),
        "order": f"{QUERY}.order",
    }


def test_the_tokenizer_and_licence_are_copied_and_nothing_else(
    source: Path, tmp_path: Path
) -> None:
    origin = tmp_path / "origin"
    shutil.copytree(source, origin)
    (origin / "LICENSE").write_text("do what you like")
    (origin / "modeling_custom.py").write_text("raise SystemExit")
    config = json.loads((origin / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_custom.Model"}
    (origin / "config.json").write_text(json.dumps(config))
    folder = pack_model(origin, tmp_path / "packed").folder
    assert sorted(file.name for file in folder.iterdir()) == [
        "LICENSE",
        "bit_width_map.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_biases_are_kept_beside_the_packed_weight(tmp_path: Path) -> None:
    packed = pack_model(tiny_opt(tmp_path / "opt", dtype="float16"), tmp_path / "packed")
    checkpoint = PackedCheckpoint.open(packed.folder)
    checkpoint.check_linears(packed.plan.shapes)
    bias = checkpoint.tensor("model.decoder.layers.0.self_attn.q_proj.bias")
    assert (bias.dtype, tuple(bias.shape)) == (torch.float16, (128,))


@pytest.mark.parametrize("wrong", ["linear", "other"])
def test_a_supplied_tensor_that_differs_from_the_plan_is_refused(
    packed: PackedModel, source: Path, tmp_path: Path, wrong: str
) -> None:
    stored = load_file(source / "model.safetensors")
    if wrong == "other":
        stored["model.norm.weight"] = stored["model.norm.weight"].half()
    owners = order_owners(packed.plan, "activation")
    weights = dict(packed.weights)
    if wrong == "linear":
        weights[QUERY] = packed.weights[DOWN]
    with pytest.raises(FormatError, match=r"the plan says|no place in the plan"):
        write_checkpoint(
            tmp_path,
            source=source,
            tensors=checkpoint_tensors(packed.plan, packed.map.linears, "activation"),
            bit_widths=packed.map,
            orders={name: f"{owner}.order" for name, owner in owners.items()},
            linear=lambda name: weights[name].pack(),
            other=stored.__getitem__,
        )


def test_a_source_that_is_quantized_already_is_refused(packed: PackedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="quantization_config already"):
        write_checkpoint(
            tmp_path,
            source=packed.folder,
            tensors=[],
            bit_widths=packed.map.model_copy(update={"linears": {}}),
            linear=lambda name: packed.weights[name].pack(),
            other=lambda name: torch.empty(0),
        )


def pack_on_a_full_disk(source: str, folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        pack_model(Path(source), Path(folder))
    except ResourceError as error:
        print(error.code)  # noqa: T201


def test_a_full_disk_is_a_resource_error(source: Path, tmp_path: Path) -> None:
    done = in_process(pack_on_a_full_disk, source, tmp_path / "packed")
    assert done.stdout.strip() == "disk_full", done.stderr


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=5), "format_version 5 is unknown"),
        (lambda q: q.update(format_version=3), "of version 3 say otherwise"),
        (lambda q: q["linears"][KEY].update(outliers=2), "of version 1 say otherwise"),
        (lambda q: q["linears"][KEY].update(outliers=0), "has outliers 0: a number of columns"),
        (lambda q: q.update(format_version=2), "code is None, expected"),
        (lambda q: q.update(code="affine"), "code is not a key of format version 1"),
        (lambda q: q.pop("format_version"), "format_version None is unknown"),
        (lambda q: q.update(group_size=64), "group_size is 64, expected 128"),
        (lambda q: q.update(surprise=1), "surprise is not a key"),
        (lambda q: q.update(quant_method="gptq"), "quant_method is 'gptq'"),
        (lambda q: q.update(linears={}), "at least one"),
        (lambda q: q["linears"][QUERY].update(widths="37"), "has widths '37'"),
        (lambda q: q["linears"][DOWN].update(widths="333"), "3 widths for K=256"),
        (lambda q: q["linears"][QUERY].update(extra=1), "exactly the keys"),
        (lambda q: q["linears"][KEY].update(order="model.x.order"), "which no such linear owns"),
        (lambda q: q["linears"].update(stranger=q["linears"][KEY]), "stranger is not in the model"),
    ],
)
def test_a_damaged_config_is_refused(
    packed: PackedModel,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    folder = shutil.copytree(packed.folder, tmp_path / "copy")
    _edit_config(folder, change)
    with pytest.raises(FormatError, match=message):
        PackedCheckpoint.open(folder).check_linears(packed.plan.shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q["linears"][EMBEDDING].update(code="trellis"), "has code 'trellis'"),
        (lambda q: q["linears"][EMBEDDING].update(code=["affine"]), r"has code \['affine'\]"),
        (lambda q: q["linears"][EMBEDDING].update(outliers=1), "exactly the keys"),
        (lambda q: q["linears"][EMBEDDING].update(widths="77"), "has widths '77'"),
        (lambda q: q["linears"][EMBEDDING].pop("code"), "of version 4 are all in code 'trellis'"),
        (lambda q: q.update(format_version=2), "exactly the keys widths and order"),
        (lambda q: q["linears"][KEY].update(code="affine"), "codes_b"),
    ],
)
def test_a_damaged_config_of_two_codes_is_refused(
    source: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    folder = pack_trellis(source, tmp_path / "packed", "quantize")
    asked = QuantizationConfig(
        budget=Budget(bits=4), code="trellis", allocation=Allocation(embeddings="quantize")
    )
    shapes = make_plan(source, asked).shapes
    PackedCheckpoint.open(folder).check_linears(shapes)
    _edit_config(folder, change)
    with pytest.raises(FormatError, match=message):
        PackedCheckpoint.open(folder).check_linears(shapes)


def _drop(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def _replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scales", lambda name: lambda tensors: _drop(tensors, name)),
        ("order", lambda name: lambda tensors: _drop(tensors, name)),
        ("extra", lambda name: lambda tensors: tensors.update({name: torch.zeros(1)})),
        ("scales", lambda name: _replace(name, Tensor.float)),
        ("scales", lambda name: _replace(name, lambda t: t[:, :-1])),
        ("scales", lambda name: _replace(name, lambda t: t * float("nan"))),
        ("scales", lambda name: _replace(name, lambda t: t - 1)),
        ("order", lambda name: _replace(name, torch.zeros_like)),
    ],
)
def test_damaged_tensors_are_refused_by_name(
    packed: PackedModel,
    tmp_path: Path,
    name: str,
    change: Callable[[str], Callable[[dict[str, Tensor]], None]],
) -> None:
    folder = shutil.copytree(packed.folder, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    change(f"{QUERY}.{name}")(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shape = next(shape for shape in packed.plan.shapes if shape.name == QUERY)
    with pytest.raises(FormatError) as refusal:
        checkpoint = PackedCheckpoint.open(folder)
        checkpoint.check_linears(packed.plan.shapes)
        checkpoint.linear(shape)
    assert refusal.value.param == f"{QUERY}.{name}"
    assert f"{QUERY}.{name}" in refusal.value.message


def test_a_truncated_file_and_a_plain_model_are_refused(
    packed: PackedModel, source: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(packed.folder, tmp_path / "copy")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BitmillError, match=r"model\.safetensors"):
        PackedCheckpoint.open(folder)
    with pytest.raises(FormatError, match="not a packed model"):
        PackedCheckpoint.open(source)
