"""What `benchmarks/exl2_reader.py` hands to ExLlamaV2's CUDA kernels, and how it compares."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from bitmill.formats.exl2.format import Exl2
from bitmill.pipeline.export import Export
from exl2_models import packed_model, weight_of

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("exl2_kernels")


@pytest.fixture
def reader(kernels: ModuleType) -> ModuleType:
    return importlib.import_module("exl2_reader")


def in_file(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"one.q_{name}": tensor for name, tensor in stored.items()}


class OnCpu:
    """Stands for the kernels: the layout's values, in fp32."""

    def __init__(self, stored: Mapping[str, Tensor], scratch: Tensor) -> None:
        self.weight = weight_of(dict(in_file(stored)), "one")
        assert scratch.shape == (self.weight.numel(),)

    def reconstruct(self) -> Tensor:
        return self.weight

    def product(self, x: Tensor) -> Tensor:
        return (x.float() @ self.weight.float().T).half()


class LastColumnWrong(OnCpu):
    def __init__(self, stored: Mapping[str, Tensor], scratch: Tensor) -> None:
        super().__init__(stored, scratch)
        self.weight[:, -1] *= -1


def test_every_linear_of_an_export_is_read_as_it_was_packed(
    tmp_path: Path, reader: ModuleType
) -> None:
    packed = packed_model(tmp_path, "activation")
    Export.of(packed.folder, Exl2()).write(tmp_path / "out", lambda *_: None)
    found = dict(reader.linears(tmp_path / "out"))
    assert found.keys() == packed.weights.keys()
    for name, weight in packed.weights.items():
        assert torch.equal(reader.values(found[name]), weight.dequantize().half()), name


def test_kernels_get_where_columns_and_groups_lie(tmp_path: Path, reader: ModuleType) -> None:
    packed = packed_model(tmp_path, "activation")
    Export.of(packed.folder, Exl2()).write(tmp_path / "out", lambda *_: None)
    for _, stored in reader.linears(tmp_path / "out"):
        given = reader.exl2_kernels.arguments(stored)
        sizes = [len(part) for part in torch.arange(len(stored["invperm"])).split(128)]
        widths, starts = stored["groups"][0::2].tolist(), stored["groups"][1::2].tolist()
        stops = [*starts[1:], len(stored["weight"])]
        map_: list[int] = []
        for group, (bits, start, stop) in enumerate(zip(widths, starts, stops, strict=True)):
            columns = (stop - start) * 32 // bits
            sizes.remove(columns)
            map_ += [one for left in range(columns, 0, -1) for one in (group, left)]
        assert sizes == []
        assert given["map"].tolist() == map_
        assert {one.dtype for one in (given["map"], given["perm"])} == {torch.int16}
        assert torch.equal(stored["invperm"][given["perm"].long()], torch.arange(len(map_) // 2))
        assert torch.equal(given["scale_max"] * 256, stored["scale_max"])
        assert given["weight"].data_ptr() != stored["weight"].data_ptr()


def test_places_beyond_15_bits_keep_their_bits(kernels: ModuleType) -> None:
    stored = kernels.random_linear(8, [2] * 300, CPU)
    stored["invperm"] = torch.arange(38400).int()
    assert (kernels.arguments(stored)["perm"].int() & 0xFFFF).tolist() == list(range(38400))


def test_tensors_that_the_extension_refuses_are_refused_by_name(kernels: ModuleType) -> None:
    stored = kernels.random_linear(32, [3, 2], CPU)
    with pytest.raises(ValueError, match=r"q_groups is torch.int32, exllamav2 takes torch.int16"):
        kernels.arguments(stored | {"groups": stored["groups"].int()})
    with pytest.raises(ValueError, match=r"'q_invperm': 256.* where .*'q_invperm': 224"):
        kernels.arguments(stored | {"invperm": stored["invperm"][:224]})


@pytest.mark.parametrize("widths", [(2,) * 3, (3, 8, 2, 5, 6, 4)])
def test_random_linears_are_read_alike_by_both_readers(
    reader: ModuleType, widths: tuple[int, ...]
) -> None:
    stored = reader.exl2_kernels.random_linear(32, widths, CPU)
    assert stored["groups"][0::2].tolist() == sorted(widths, reverse=True)
    assert torch.equal(reader.values(stored), weight_of(in_file(stored), "one"))
    reader.exl2_kernels.arguments(stored)


@pytest.mark.parametrize(("kernel", "right"), [(OnCpu, True), (LastColumnWrong, False)])
def test_a_wrong_value_is_told_from_right_ones(
    reader: ModuleType, monkeypatch: pytest.MonkeyPatch, kernel: type[OnCpu], right: bool
) -> None:
    monkeypatch.setattr(reader.exl2_kernels, "Matrix", kernel)
    torch.manual_seed(0)
    stored = reader.exl2_kernels.random_linear(64, (3, 4), CPU)
    row = reader.compare(stored, CPU)
    assert reader.is_right(row) is right
    assert (row["difference"] == 0) is right
    assert (max(row["products"].values()) < 1e-3) is right
    text = reader.table({"command": "-", "machine": {}, "folders": {"one": {"linear": row}}})
    assert f"| one | 1 | 1 | 3, 4 | {int(right)} of 1 |" in text


@pytest.mark.gpu
def test_exllamav2s_kernels_give_the_values_of_an_export(
    tmp_path: Path, reader: ModuleType
) -> None:
    if not importlib.import_module("peer_library").available("BITMILL_EXL2_LIBRARY", "exllamav2"):
        pytest.skip("exllamav2's sources are not on the path")
    packed = packed_model(tmp_path, "activation")
    Export.of(packed.folder, Exl2()).write(tmp_path / "out", lambda *_: None)
    for name, stored in reader.linears(tmp_path / "out"):
        row = reader.compare(stored, torch.device("cuda", 0))
        assert reader.is_right(row), (name, row)
