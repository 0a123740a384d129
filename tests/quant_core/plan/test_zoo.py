"""Maps of others: which fit a model, and how near the model is that they are of."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Allocation, Budget, QuantizationConfig
from bitmill.errors import FormatError, SpecError
from bitmill.pipeline.admission import admit
from bitmill.plan.fingerprint import Fingerprint
from bitmill.plan.model_plan import Plan, plan_source
from bitmill.plan.source_model import read_source
from bitmill.plan.zoo import INDEX_NAME, find_maps
from tiny import tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same shapes."""
    return tiny_llama(tmp_path_factory.mktemp("tuned") / "model", num_hidden_layers=1, seed=1)


@pytest.fixture(scope="module")
def wider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wider") / "model"
    return tiny_llama(folder, num_hidden_layers=1, intermediate_size=384)


def planned(folder: Path) -> Plan:
    return plan_source(read_source(folder), QuantizationConfig(budget=Budget(bits=8)))


def test_a_fingerprint_is_of_tensors_not_of_files(
    base: Path, tuned: Path, wider: Path, tmp_path: Path
) -> None:
    one, other = (Fingerprint.of_folder(place, weights=True) for place in (base, tuned))
    assert one.shape == other.shape != Fingerprint.of_folder(wider).shape
    assert one.weights != other.weights
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    told = {"metadata": {}, "weight_map": index}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(told))
    assert Fingerprint.of_folder(tmp_path, weights=True) == one


def test_names_dtypes_and_shapes_count_in_both_fingerprints(base: Path, tmp_path: Path) -> None:
    one = Fingerprint.of_folder(base, weights=True)
    tensors = load_file(base / "model.safetensors")
    name, tensor = next(item for item in tensors.items() if item[1].ndim == 2)
    changed = {
        "name": {**tensors, f"{name}_": tensors[name]},
        "dtype": {**tensors, name: tensor.view(torch.int32)},
        "shape": {**tensors, name: tensor.reshape(-1)},
    }
    del changed["name"][name]
    for what, content in changed.items():
        (tmp_path / what).mkdir()
        save_file(content, tmp_path / what / "model.safetensors")
        other = Fingerprint.of_folder(tmp_path / what, weights=True)
        assert other.shape != one.shape, what
        assert other.weights != one.weights, what


def test_maps_are_found_the_nearest_first(base: Path, tuned: Path, tmp_path: Path) -> None:
    plan, own = planned(base), Fingerprint.of_folder(base, weights=True)
    theirs = Fingerprint.of_folder(tuned, weights=True)
    maps = {
        name: BitWidthMap.uniform(plan.shapes, width)
        for name, width in (("unknown", 2), ("tuned", 3), ("base", 4))
    }
    for name, one in maps.items():
        (tmp_path / f"{name}.json").write_text(one.to_json())
    entries = {
        "base.json": own.model_dump() | {"model": "org/base"},
        "tuned.json": theirs.model_dump(),
    }
    (tmp_path / INDEX_NAME).write_text(json.dumps({"schema_version": 1, "maps": entries}))
    layers = {0: {"self_attn.q_proj": [2, 3], "mlp.down_proj": [3, 2]}}
    with zipfile.ZipFile(tmp_path / "published.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(layers, protocol=2))
    found = find_maps(tmp_path, own, plan)
    assert [(one.file, one.match, one.bits) for one in found] == [
        ("base.json", "weights", 4.0),
        ("tuned.json", "shape", 3.0),
        ("published.pt", "fits", 2.5),
        ("unknown.json", "fits", 2.0),
    ]
    assert found[0].model == "org/base"
    unread = find_maps(tmp_path, Fingerprint.of_folder(base), plan)
    assert [one.match for one in unread] == ["shape", "shape", "fits", "fits"]


def test_what_fits_no_linear_is_passed_over(base: Path, wider: Path, tmp_path: Path) -> None:
    other = BitWidthMap.uniform(planned(wider).shapes, 3)
    (tmp_path / "wider.json").write_text(other.to_json())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "empty.json").write_text('{"linears": {}}')
    (tmp_path / "broken.pt").write_bytes(b"no pickle")
    buffer = io.BytesIO()
    pickle.dump({0: {"nothing": [2]}}, buffer, protocol=2)
    (tmp_path / "others.pt").write_bytes(buffer.getvalue())
    assert find_maps(tmp_path, Fingerprint.of_folder(base), planned(base)) == []
    (tmp_path / INDEX_NAME).write_text('{"schema_version": 1, "surplus": 1}')
    with pytest.raises(SpecError, match="surplus"):
        find_maps(tmp_path, Fingerprint.of_folder(base), planned(base))


def test_a_map_is_applied_to_a_fine_tune_and_to_no_other_shape(
    base: Path, tuned: Path, wider: Path
) -> None:
    shapes = planned(base).shapes
    bit_widths = BitWidthMap.uniform(shapes, 3)
    config = QuantizationConfig(
        budget=Budget(code_bits=3),
        allocation=Allocation(method="map", map=bit_widths, order="natural"),
    )
    assert admit(tuned, config).config.allocation.map == bit_widths
    with pytest.raises(FormatError, match=r"2 groups to model\.layers\.0\.mlp\.down_proj"):
        admit(wider, config)
