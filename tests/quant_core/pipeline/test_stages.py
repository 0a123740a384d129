"""A stage runs again exactly where something differs that it depends on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import QuantizationConfig, parse_config
from bitmill.pipeline.job import run_job
from bitmill.pipeline.learned_parameters import LearnedParameters
from bitmill.pipeline.stage import Stage, content
from bitmill.pipeline.stages import resume
from bitmill.pipeline.stages.evaluate import TaskRun
from bitmill.pipeline.stages.plan import Tasks
from bitmill.pipeline.workspace import Made, Workspace
from bitmill.plan.fingerprint import hash_weights
from tiny import byte_tokenizer, tiny_llama

pytestmark = [
    pytest.mark.e2e,
    # Inputs are changed without checks, and some changed values are illegal.
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings"),
]

TEXT = (Path(__file__).parents[1] / "calibration.txt").read_text()
UNIFORM = {"method": "uniform", "order": "activation"}
SMALL = {"sequences": 4, "length": 64, "held_out": 1}
SHORT = {"texts": ["wiki_evaluation"], "sequences": 1, "length": 64}


def config(folder: Path, **changes: Any) -> QuantizationConfig:
    text = {"source": "file", "path": str(folder / "text.txt")}
    base: dict[str, Any] = {
        "budget": {"code_bits": 3},
        "allocation": UNIFORM,
        "refinement": {"method": "rtn"},
        "calibration": SMALL,
        "evaluation": SHORT,
        "threads": 1,
    }
    asked = base | changes
    return parse_config(asked | {"calibration": {"text": text} | asked["calibration"]})


def run(folder: Path, asked: QuantizationConfig, work: str = "work", out: str = "out") -> set[str]:
    """The stages that ran."""
    ran: set[str] = set()

    def watch(event: Any) -> None:
        if event.state == "started":
            ran.add(event.stage)

    run_job(asked, folder / "source", folder / work, folder / out, on_progress=watch)
    return ran


def published(folder: Path) -> dict[str, bytes]:
    """All files but the lists of files; of the report what no clock decides."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(found["quality.json"])
    del report["seconds"], found["MANIFEST.json"], found["SHA256SUMS"]
    return found | {"quality.json": json.dumps(report).encode()}


def new_source(folder: Path) -> Path:
    (folder / "text.txt").write_text(TEXT)
    return tiny_llama(folder / "source", tie_word_embeddings=False)


# What is hashed


@dataclass(frozen=True)
class Recorded:
    """Every stage of some jobs with the inputs it was run on."""

    inputs: list[tuple[Stage[Any], Any]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("recorded")
    new_source(folder)
    found: list[tuple[Stage[Any], Any]] = []
    plain = Workspace.run

    def recording(self: Workspace, stage: Stage[Any], inputs: Any) -> Made:
        found.append((stage, inputs))
        return plain(self, stage, inputs)

    learning = {"method": "omniquant", "omniquant": {"epochs": 1, "batch": 4}}
    asked = config(
        folder,
        allocation={"method": "knapsack", "order": "activation"},
        refinement=learning,
        evaluation=SHORT | {"baselines": ["uniform-3"]},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "run", recording)
        run(folder, asked)
    by_name = {stage.name: inputs for stage, inputs in found}
    learned = LearnedParameters.open(folder / "out")
    found.append(
        (
            resume.STAGE,
            resume.Inputs(
                learned, by_name["plan"] and by_name["refine"].plan, by_name["refine"].bit_widths
            ),
        )
    )
    tasks = TaskRun(
        Tasks(("arc",), folder, {"arc.yaml": "digest"}), {"tokenizer.json": "d"}, 0, False
    )
    with_tasks = [
        (stage, replace(inputs, tasks=tasks)) for stage, inputs in found if stage.name == "evaluate"
    ]
    return Recorded(found + with_tasks)


def variants(value: Any, where: str = "") -> Iterator[tuple[str, bool, Any]]:
    """(name, whether it counts, the value) for `value` with one leaf of it changed."""
    if value is None:
        yield where, True, "something"
    elif isinstance(value, bool):
        yield where, True, not value
    elif isinstance(value, int | float):
        yield where, True, value + 1
    elif isinstance(value, str):
        yield where, True, value + "x"
    elif isinstance(value, torch.Tensor | np.ndarray):
        changed = value.clone() if isinstance(value, torch.Tensor) else value.copy()
        changed.reshape(-1)[-1:] += 1
        if changed.size if isinstance(changed, np.ndarray) else changed.numel():
            yield where, True, changed
        yield f"{where} shape", True, value.reshape(1, *value.shape)
    elif isinstance(value, Mapping):
        yield f"{where} more", True, {**value, "another": next(iter(value.values()), "x")}
        for key in list(value)[:1]:
            yield f"{where} less", True, {k: v for k, v in value.items() if k != key}
            for name, counts, inner in variants(value[key], f"{where}[{key}]"):
                yield name, counts, {**value, key: inner}
    elif isinstance(value, tuple):
        yield f"{where} more", True, (*value, value[0] if value else "x")
        if value:
            yield f"{where} less", True, value[1:]
            for name, counts, inner in variants(value[0], f"{where}[0]"):
                yield name, counts, (inner, *value[1:])
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            for inner_name, counts, inner in variants(getattr(value, name), f"{where}.{name}"):
                yield inner_name, counts, value.model_copy(update={name: inner})
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            inner_value = getattr(value, one.name)
            if not one.compare:
                yield f"{where}.{one.name}", False, changed_by(value, one.name, "elsewhere")
                continue
            for name, counts, inner in variants(inner_value, f"{where}.{one.name}"):
                yield name, counts, changed_by(value, one.name, inner)
    else:
        raise TypeError(f"{where} is a {type(value).__name__}")


def changed_by(value: Any, name: str, inner: Any) -> Any:
    """A copy with another value of one field, without checks."""
    copy = object.__new__(type(value))
    for one in fields(value):
        object.__setattr__(copy, one.name, getattr(value, one.name))
    object.__setattr__(copy, name, inner)
    return copy


def test_every_stage_is_recorded_and_hashes_all_of_its_inputs(recorded: Recorded) -> None:
    assert {stage.name for stage, _ in recorded.inputs} == {
        "resolve", "plan", "profile", "allocate", "refine",
        "pack", "verify", "evaluate", "publish",
    }  # fmt: skip
    for stage, inputs in recorded.inputs:
        digests = {"": stage.digest(inputs)}
        assert stage.digest(replace(inputs)) == digests[""]
        for name, counts, changed in variants(inputs):
            digest = stage.digest(changed)
            if counts:
                assert digest not in digests.values(), f"{stage.name}{name}"
                digests[name] = digest
            else:
                assert digest == digests[""], f"{stage.name}{name}"
        assert len(digests) > len([one for one in fields(inputs) if one.compare])


def test_what_decides_nothing_is_told_by_name(recorded: Recorded) -> None:
    """Fields that may differ without another result: places, what a profile is called by, and
    weights of tokens and refined blocks that refinement would make itself."""
    free = {
        f"{stage.name}{name}"
        for stage, inputs in recorded.inputs
        for name, counts, _ in variants(inputs)
        if not counts
    }
    places = {"folder", "known", "packed", "outputs"}
    assert {name for name in free if name.rpartition(".")[2] not in places} == {
        "profile.origin", "allocate.profile.origin", "evaluate.profile.origin",
        "publish.profiled.profile.origin", "profile.weights", "refine.weights",
        "refine.kept",
    }  # fmt: skip


def test_a_path_has_no_content() -> None:
    @dataclass(frozen=True)
    class Place:
        path: Path
        free: Path = field(compare=False, default=Path("a"))

    with pytest.raises(TypeError, match="cannot be an input"):
        content(Place(Path("a")))


def test_values_of_different_kinds_differ() -> None:
    values = (None, 0, 0.5, False, "", "0", (), ("",), {}, {"": ""}, np.zeros(1), torch.zeros(2))
    assert len({json.dumps([type(v).__name__, content(v)]) for v in values}) == len(values)
    assert content(np.zeros(2, np.float32)) == content(torch.zeros(2))
    assert content(np.zeros(2)) != content(torch.zeros(2))


def test_tensors_are_hashed_one_by_one(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 2), "b": torch.zeros(2, 3), "c": torch.zeros(6).bfloat16()}
    save_file(tensors, tmp_path / "first.safetensors")
    whole, found = hash_weights(tmp_path / "first.safetensors")
    assert found.keys() == tensors.keys()
    assert len({whole, *found.values()}) == 4
    save_file(tensors | {"b": torch.ones(2, 3)}, tmp_path / "second.safetensors")
    other, changed = hash_weights(tmp_path / "second.safetensors")
    assert other != whole
    assert {name for name in tensors if changed[name] != found[name]} == {"b"}


# What runs again


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a text, and the work folder and output of a finished job."""
    folder = tmp_path_factory.mktemp("finished")
    new_source(folder)
    every = {*("resolve", "plan", "profile", "allocate", "refine")}
    every |= {"pack", "verify", "evaluate", "publish"}
    assert run(folder, config(folder)) == every
    assert run(folder, config(folder)) == set()
    return folder


def edit_weight(source: Path, name: str, factor: float) -> None:
    file = source / "model.safetensors"
    stored = load_file(file)
    save_file(stored | {name: stored[name] * factor}, file, metadata={"format": "pt"})


def other_head(folder: Path) -> None:
    edit_weight(folder / "source", "lm_head.weight", 2)


def other_block(folder: Path) -> None:
    edit_weight(folder / "source", "model.layers.1.mlp.down_proj.weight", 1.5)


def other_settings(folder: Path) -> None:
    file = folder / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-3}))


def other_tokens(folder: Path) -> None:
    """The tokenizer swaps two letters."""
    file = folder / "source" / "tokenizer.json"
    stored = json.loads(file.read_text())
    words = stored["model"]["vocab"]
    words["e"], words["t"] = words["t"], words["e"]
    file.write_text(json.dumps(stored))


def other_template(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 'NEW' }}"
    tokenizer.save_pretrained(folder / "source")


def a_licence(folder: Path) -> None:
    (folder / "source" / "LICENSE").write_text("Do what you like.")


def a_note(folder: Path) -> None:
    (folder / "source" / "README.md").write_text("A model.")


def other_text(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT[100:] + TEXT[:100])


def nothing(folder: Path) -> None:
    """The files stay, one of them touched."""
    (folder / "source" / "model.safetensors").touch()


LATE = {"pack", "verify", "evaluate", "publish"}
TEXT_READERS = {"profile", "refine", *LATE}
CASES: dict[str, tuple[Callable[[Path], None], dict[str, Any], set[str]]] = {
    "touched": (nothing, {}, {"resolve"}),
    "head": (other_head, {}, {"resolve", "plan", *LATE}),
    "block": (other_block, {}, {"resolve", "plan", *TEXT_READERS}),
    "config.json": (other_settings, {}, {"resolve", "plan", *TEXT_READERS}),
    "tokens": (other_tokens, {}, {"resolve", *TEXT_READERS}),
    "chat template": (other_template, {}, {"resolve", "pack", "verify", "publish"}),
    "licence": (a_licence, {}, {"resolve", "pack", "verify", "publish"}),
    "note": (a_note, {}, {"resolve"}),
    "calibration text": (other_text, {}, TEXT_READERS),
    "evaluation text": (
        lambda _: None,
        {"evaluation": SHORT | {"texts": ["handbook_evaluation"]}},
        {"evaluate", "publish"},
    ),
    "evaluation length": (
        lambda _: None,
        {"evaluation": SHORT | {"length": 32}},
        {"plan", "evaluate", "publish"},
    ),
    "budget": (
        lambda _: None,
        {"budget": {"code_bits": 3.05}},
        {"allocate", "verify"},
    ),
    "unspent budget": (
        lambda _: None,
        {"budget": {"code_bits": 3.5}},
        {"allocate", "verify", "evaluate", "publish"},
    ),
    "seed": (lambda _: None, {"seed": 1}, TEXT_READERS),
    "held-out windows": (
        lambda _: None,
        {"calibration": SMALL | {"held_out": 2}},
        {"refine"},  # rounding decides nothing by them: the same blocks come out
    ),
    "method": (lambda _: None, {"refinement": {"method": "gptq"}}, {"refine", *LATE}),
    "kept linears": (
        lambda _: None,
        {"allocation": UNIFORM | {"keep": ["model.layers.0.*"]}},
        {"plan", "profile", "allocate", "refine", *LATE},
    ),
    "column order": (
        lambda _: None,
        {"allocation": UNIFORM | {"order": "natural"}},
        {"allocate", "refine", *LATE},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_exactly_what_depends_on_a_change_runs_again(
    name: str, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    assert run(folder, config(folder)) == {"resolve", "publish"}  # files and output lie elsewhere
    before = published(folder / "out")
    change, settings, expected = CASES[name]
    change(folder)
    asked = config(folder, **settings)
    assert run(folder, asked) == expected
    if "publish" in expected:
        run(folder, asked, "fresh work", "fresh")
        before = published(folder / "fresh")
    assert published(folder / "out") == before


def test_another_map_runs_again_what_depends_on_it(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    found = BitWidthMap.load(folder / "out" / "bit_width_map.json")
    name = "model.layers.1.mlp.up_proj"
    first = found.model_dump()
    second = found.model_copy(update={"linears": found.linears | {name: (2, 3)}}).model_dump()
    asked = [
        config(folder, allocation=UNIFORM | {"method": "map", "map": m}) for m in (first, second)
    ]
    # The same widths under another method: only the report's row has another name.
    expected = {"resolve", "allocate", "evaluate", "publish"}
    assert run(folder, asked[0]) == expected
    assert run(folder, asked[1]) == {"allocate", "refine", *LATE}
    run(folder, asked[1], "fresh work", "fresh")
    assert published(folder / "out") == published(folder / "fresh")


# What jobs of a sweep share


def test_jobs_of_a_sweep_run_the_source_once_and_find_what_each_finds_alone(finished: Path) -> None:
    made: list[str] = []

    def of_a_sweep(name: str, bits: float) -> None:
        run_job(
            config(finished, budget={"code_bits": bits}),
            finished / "source",
            finished / f"work-{name}",
            finished / name,
            stage_folder=finished / "stages",
            on_progress=lambda e: made.append(e.stage) if e.state == "finished" else None,
        )

    of_a_sweep("cell-1", 2)
    assert made.count("evaluate") == 2, "the source's outputs, and the report"
    made.clear()
    of_a_sweep("cell-2", 3)
    assert made == ["allocate", "refine", "pack", "verify", "evaluate", "publish"]
    assert published(finished / "cell-2") == published(finished / "out")
