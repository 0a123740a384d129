"""Refined blocks on disk: what is saved beside the caller is whole, and its errors are not lost."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from bitmill.calibration.windows import CalibrationSet
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import parse_config
from bitmill.errors import ResourceError
from bitmill.io import atomic as storage
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import Plan, make_plan
from bitmill.quant.tensors import QuantizedWeight
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.refinement.store import BlockSaver, load_block, report_path, save_block, tensors_path
from bitmill.results import LinearResult
from rank_function import in_process
from tiny import tiny_llama
from weights import random_weight

SPEC = parse_config({"budget": {"code_bits": 3}})
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    folder = tiny_llama(tmp_path_factory.mktemp("model"))
    return StreamedModel(folder, make_plan(folder, SPEC), device=CPU, dtype=torch.float32)


def block_of(plan: Plan, i: int = 0) -> dict[str, QuantizedWeight]:
    return {
        linear.name: random_weight(
            linear.rows, linear.columns, (3, 8, 1)[: linear.shape.groups], ordered=True, seed=seed
        )
        for seed, linear in enumerate(plan.block_linears(i))
    }


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_block_reads_back_exactly(model: StreamedModel, tmp_path: Path) -> None:
    weights = block_of(model.plan)
    quality = LinearResult(name="x", code_bits=3, relative_error=0.1)
    save_block(tmp_path, 0, weights, [quality], {"index": 0})
    found = load_block(tmp_path, model.plan, 0)
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name].widths == weight.widths
        for part in ("codes", "scales", "zeros", "order"):
            assert torch.equal(getattr(found[name], part), getattr(weight, part))
    report = storage.read_json(report_path(tmp_path, 0))
    assert report["code_hashes"] == {name: w.codes_sha256() for name, w in weights.items()}
    assert report["tensors_sha256"] == storage.sha256_file(tensors_path(tmp_path, 0))
    assert report["linears"] == [quality.model_dump(mode="json")]
    assert report["learning"] == {"index": 0}


def test_the_file_is_what_the_safetensors_library_writes(
    model: StreamedModel, tmp_path: Path
) -> None:
    weights = block_of(model.plan)
    save_block(tmp_path, 0, weights, [], None)
    tensors = {}
    for name, weight in weights.items():
        own = weight.pack().tensors(name) | weight.rewrites.tensors(name)
        tensors |= {key: value.contiguous() for key, value in own.items()}
    assert load_file(tensors_path(tmp_path, 0)).keys() == tensors.keys()
    assert tensors_path(tmp_path, 0).read_bytes() == save(tensors, {"format": "pt"})


def test_the_caller_goes_on_while_a_block_is_saved(
    model: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write_bytes = threading.Event(), storage.write_bytes

    def later(target: Path, *data: bytes | memoryview) -> None:
        assert may_write.wait(60)
        write_bytes(target, *data)

    monkeypatch.setattr(storage, "write_bytes", later)
    told: list[int] = []
    with BlockSaver(tmp_path, CPU, told.append) as saver:
        saver.save(0, block_of(model.plan), [], None)
        saver.look()
        assert not report_path(tmp_path, 0).exists()
        assert told == []
        may_write.set()
        saver.save(1, block_of(model.plan, 1), [], None)
        assert report_path(tmp_path, 0).is_file()
        assert told == [0]
        saver.wait()
        assert report_path(tmp_path, 1).is_file()
        saver.look()
        assert told == [0, 1]


def test_a_look_tells_what_is_saved_by_then(model: StreamedModel, tmp_path: Path) -> None:
    told: list[int] = []
    with BlockSaver(tmp_path, CPU, told.append) as saver:
        saver.save(0, block_of(model.plan), [], None)
        while not told:
            saver.look()
    assert told == [0]


def test_what_goes_wrong_in_the_thread_is_raised_once(model: StreamedModel, tmp_path: Path) -> None:
    with BlockSaver(tmp_path / "missing", CPU, list[int]().append) as saver:
        saver.save(0, block_of(model.plan), [], None)
        with pytest.raises(FileNotFoundError):
            saver.save(1, block_of(model.plan), [], None)
        saver.wait()


def test_an_error_of_the_caller_waits_for_the_save_and_is_the_one_raised(
    model: StreamedModel, tmp_path: Path
) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with (
            pytest.raises(ValueError, match="of the caller"),
            BlockSaver(folder, CPU, list[int]().append) as saver,
        ):
            saver.save(0, block_of(model.plan), [], None)
            raise ValueError("of the caller")
        assert not [t for t in threading.enumerate() if t.name.startswith("save-block")]
    assert names_in(tmp_path) == ["block-00000.json", "block-00000.safetensors"]


def refine(model: StreamedModel, folder: Path, told: list[int]) -> RefinedModel:
    tokens = torch.randint(2, 258, (6, 32), generator=torch.Generator().manual_seed(1))
    widths = {shape.name: (3,) * shape.groups for shape in model.plan.shapes}

    def on_unit(done: int, *_: object) -> None:
        assert all(report_path(folder, i).is_file() for i in range(done))
        told.append(done)

    folder.mkdir(exist_ok=True)
    inputs = RefineInputs(
        CalibrationSet(tokens[:4], tokens[4:], ""), BitWidthMap(linears=widths), {}
    )
    refine_model(model, inputs, SPEC.method, folder, seed=0, on_unit=on_unit)
    return RefinedModel(folder, model.plan)


def test_a_block_is_told_when_saved_and_made_again_where_its_report_is_missing(
    model: StreamedModel, tmp_path: Path
) -> None:
    told: list[int] = []
    straight = refine(model, tmp_path / "straight", told)
    assert told == [1, 2]
    again = refine(model, tmp_path / "again", [])
    first = tensors_path(again.folder, 0).stat().st_mtime_ns
    report_path(again.folder, 1).unlink()  # as a kill between the two files leaves it
    (again.folder / ".block-00001.json.bitmill-partial").write_text("{")
    refine(model, again.folder, told)
    assert told == [1, 2, 1, 2]
    assert tensors_path(again.folder, 0).stat().st_mtime_ns == first
    assert names_in(again.folder) == names_in(straight.folder)
    assert again.digest == straight.digest


def refine_on_a_full_disk(source: str, folder: str) -> None:
    plan = make_plan(Path(source), SPEC)
    model = StreamedModel(Path(source), plan, device=CPU, dtype=torch.float32)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    told: list[int] = []
    try:
        refine(model, Path(folder), told)
    except ResourceError as error:
        print(error.code, told, error.message)  # noqa: T201


def test_a_full_disk_ends_the_refinement_at_its_block(model: StreamedModel, tmp_path: Path) -> None:
    done = in_process(refine_on_a_full_disk, model.source.folder, tmp_path / "refine")
    assert done.stdout.startswith(
        "disk_full [] no space is left while block-00000.safetensors is written"
    ), done.stdout
    assert names_in(tmp_path / "refine") == []
