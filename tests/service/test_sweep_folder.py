"""`--out` of sweeps: only an earlier sweep's folder is written into."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitmill_service.client.client import Client
from finished import Stack, spec_json

Command = Callable[..., tuple[int, str, str]]
MINE = {
    "table.csv": "years of work",
    "table.json": "[]",
    "plot.svg": "<svg/>",
    "sweep.json": '{"method": "bayes"}',
    "cell-01/thesis.txt": "years of work",
    "stages/thesis.txt": "years of work",
    "thesis.txt": "years of work",
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    file = tmp_path / "study.json"
    file.write_text(json.dumps({"job": spec_json(), "grid": {"budget.code_bits": [3, 4]}}))
    return file


@pytest.mark.parametrize("name", MINE)
@pytest.mark.parametrize("how", ["here", "api", "show"])
def test_a_folder_with_other_things_is_refused_untouched(
    stack: Stack, client: Client, command: Command, study: Path, tmp_path: Path, how: str, name: str
) -> None:
    sweep = client.submit_sweep(json.loads(study.read_text()))
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text(MINE[name])
    out = ("--out", tmp_path / "out")
    code, _, told = {
        "here": lambda: command("sweep", study, *out),
        "api": lambda: command("sweep", study, "--api", "--url", stack.url, *out),
        "show": lambda: command("sweeps", "show", sweep.id, "--url", stack.url, *out),
    }[how]()
    assert code == 2, told
    assert "give another" in told or "choose another" in told
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == MINE[name]
    assert client.sweeps().sweeps[0].id == sweep.id


def test_things_put_beside_the_stages_of_an_earlier_sweep_stay(
    command: Command, study: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "stages").mkdir(parents=True)
    (out / "sweep.json").write_text("{}")
    (out / "stages" / "thesis.txt").write_text("years of work")
    code, _, told = command("sweep", study, "--out", out)
    assert (code, "thesis.txt" in told) == (2, True)
    assert (out / "stages" / "thesis.txt").is_file()


def test_the_table_of_a_service_is_written_again_but_never_over_a_sweep_that_ran_here(
    stack: Stack, client: Client, command: Command, study: Path, tmp_path: Path
) -> None:
    sweep = client.submit_sweep(json.loads(study.read_text()))
    show = ("sweeps", "show", sweep.id, "--url", stack.url, "--out", tmp_path / "out")
    for _ in range(2):
        code, _, told = command(*show)
        assert code == 0, told
        assert (tmp_path / "out" / "table.csv").read_text().count("\n") == 3
    record = tmp_path / "out" / "sweep.json"
    record.write_text('{"cell-01": {}}')
    code, _, told = command(*show)
    assert (code, "sweep.json" in told) == (2, True)
    assert record.read_text() == '{"cell-01": {}}'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("job: {label: 2024-01-01}\ngrid: {seed: [1]}", "date is not JSON serializable; put dates"),
        ("job: {}\ngrid: {label: [2024-01-01, 2024-02-01]}", "put dates in quotes"),
        ("job: &a {budget: *a}\ngrid: {seed: [1]}", "Circular reference"),
        ("job: {}\ngrid:\n  seed: [1, 2]\n  seed: [3]", "seed stands twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=["job", "grid", "circle", "twice", "deep"],
)
def test_yaml_that_json_has_no_place_for_is_refused(
    command: Command, tmp_path: Path, text: str, problem: str
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    code, _, told = command("sweep", file, "--out", tmp_path / "out")
    assert code == 2
    assert problem in told
    assert not (tmp_path / "out").exists()
