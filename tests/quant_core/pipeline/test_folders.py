"""A job touches no folder that holds what is not its own, whichever of its names it was given."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitmill.config.quantization import parse_config
from bitmill.errors import InputError
from bitmill.pipeline.job import run_job
from bitmill.pipeline.progress import Progress
from tiny import tiny_llama

CONFIG = parse_config(
    {
        "budget": {"code_bits": 3},
        "allocation": {"method": "uniform", "order": "natural"},
        "refinement": {"method": "rtn"},
        "calibration": {
            "text": {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")},
            "sequences": 2,
            "length": 32,
            "held_out": 0,
        },
        "evaluation": {"texts": ["wiki_evaluation"], "sequences": 1, "length": 32},
        "threads": 1,
    }
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "source")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    return tmp_path


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


def run(place: Path, **folders: str) -> list[Progress]:
    told: list[Progress] = []
    named = {"out": "out", "work": "work", "profiles": "profiles"} | folders
    run_job(
        CONFIG,
        place / "source",
        place / named["work"],
        place / named["out"],
        profile_folder=place / named["profiles"],
        on_progress=told.append,
    )
    return told


@pytest.mark.parametrize("folder", ["out", "work", "profiles"])
@pytest.mark.parametrize("name", ["mine", "source", ".", "source/below", "mine/thesis.txt/below"])
def test_a_folder_of_the_users_is_refused_before_the_first_stage(
    place: Path, folder: str, name: str
) -> None:
    before = everything(place)
    told: list[Progress] = []
    with pytest.raises(InputError):
        told += run(place, **{folder: name})
    assert everything(place) == before
    assert told == []


@pytest.mark.parametrize(
    "folders",
    [
        {"work": "out"},
        {"work": "out/work"},
        {"out": "work/out"},
        {"profiles": "work"},
        {"profiles": "out/profiles"},
    ],
)
def test_folders_of_one_job_do_not_overlap(place: Path, folders: dict[str, str]) -> None:
    before = everything(place)
    with pytest.raises(InputError, match="apart from each other"):
        run(place, **folders)
    assert everything(place) == before


def own_file(out: Path) -> None:
    (out / "notes.txt").write_text("mine")


def own_folder(out: Path) -> None:
    (out / "drafts").mkdir()


def listed_again(out: Path) -> None:
    """Nothing: an earlier result is replaced without asking."""


CHANGES: list[tuple[Callable[[Path], None], bool]] = [
    (own_file, True),
    (own_folder, True),
    (listed_again, False),
]


@pytest.mark.parametrize(("change", "refused"), CHANGES)
def test_an_earlier_result_is_replaced_only_while_nothing_else_lies_in_it(
    place: Path, change: Callable[[Path], None], refused: bool
) -> None:
    run(place)
    change(place / "out")
    shutil.rmtree(place / "work")
    before = everything(place / "out")
    if not refused:
        run(place)
        return
    with pytest.raises(InputError, match="did not write"):
        run(place)
    assert everything(place / "out") == before


def test_what_came_into_the_result_while_the_job_ran_stays(place: Path) -> None:
    def arrive(progress: Progress) -> None:
        if progress.stage == "evaluate" and progress.state == "finished":
            (place / "out").mkdir()
            (place / "out" / "notes.txt").write_text("mine")

    options: dict[str, Any] = {"on_progress": arrive}
    with pytest.raises(InputError, match=r"notes\.txt"):
        run_job(CONFIG, place / "source", place / "work", place / "out", **options)
    assert [path.name for path in (place / "out").iterdir()] == ["notes.txt"]
    assert not list(place.glob(".*"))
    shutil.rmtree(place / "out")
    told = run(place)
    assert [e.stage for e in told if e.state == "finished"] == ["publish"]
