"""A grid over a specification becomes its jobs."""

from __future__ import annotations

from typing import Any

import pytest

from bitmill.errors import SpecError
from bitmill_workers.sweep_spec import MAX_CELLS, in_turn, parse_sweep

MODEL = {"source": "path", "path": "models/tiny"}


def sweep(grid: dict[str, list[Any]], **job: Any) -> dict[str, Any]:
    return {"job": {"model": MODEL, "budget": {"bits": 3}} | job, "grid": grid}


def test_every_combination_is_a_job_the_last_axis_varying_fastest() -> None:
    cells = parse_sweep(
        sweep({"refinement.method": ["rtn", "gptq"], "budget.bits": [2.5, 4]}, seed=7)
    ).cells()
    found = [(c.number, c.spec.refinement.method, c.spec.budget.bits, c.spec.seed) for c in cells]
    assert found == [(1, "rtn", 2.5, 7), (2, "rtn", 4, 7), (3, "gptq", 2.5, 7), (4, "gptq", 4, 7)]
    assert cells[2].name == "cell 3 (refinement.method=gptq, budget.bits=2.5)"


def test_a_budget_of_another_kind_takes_the_place_of_the_common_one() -> None:
    memory = {"memory": 10**9, "context": 1024}
    cells = parse_sweep(sweep({"budget.code_bits": [2, 3]})).cells()
    assert [cell.spec.budget.kind for cell in cells] == ["code_bits", "code_bits"]
    (cell,) = parse_sweep(sweep({"budget.memory": [2 * 10**9]}, budget=memory)).cells()
    assert (cell.spec.budget.memory, cell.spec.budget.context) == (2 * 10**9, 1024)


def test_a_part_may_stand_behind_its_whole() -> None:
    grid: dict[str, list[Any]] = {
        "budget": [{"memory": 10**9, "context": 64}],
        "budget.context": [8, 16],
    }
    cells = parse_sweep(sweep(grid)).cells()
    assert [cell.spec.budget.context for cell in cells] == [8, 16]


def test_effort_fills_each_cell_and_whole_objects_are_values() -> None:
    texts = [{"source": "bundled", "name": name} for name in ("wiki_calibration",)]
    grid: dict[str, list[Any]] = {"effort": ["fast", "balanced"], "calibration.text": texts}
    cells = parse_sweep(sweep(grid)).cells()
    assert [cell.spec.refinement.method for cell in cells] == ["gptq", "omniquant"]


def test_cells_take_the_windows_of_their_effort_and_profiles_of_their_own() -> None:
    grid: dict[str, list[Any]] = {"effort": ["fast", "best"], "budget.bits": [3, 4]}
    cells = parse_sweep(sweep(grid, code="trellis")).cells()
    assert [cell.spec.calibration.sequences for cell in cells] == [64, 64, 160, 160]
    assert [cell.number for cell in in_turn(cells)] == [1, 3, 2, 4]
    same = parse_sweep(sweep(grid)).cells()
    assert [cell.number for cell in in_turn(same)] == [1, 2, 3, 4]


def test_a_sweep_names_the_jobs_that_have_no_name() -> None:
    named = sweep({"seed": [0]}) | {"label": "study"}
    assert parse_sweep(named).cells()[0].spec.label == "study"
    named["job"]["label"] = "mine"
    assert parse_sweep(named).cells()[0].spec.label == "mine"


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (sweep({}), "grid"),
        (sweep({"seed": []}), "no values"),
        (sweep({"seed": [1, 2, 1]}), "1 twice"),
        (sweep({"sed": [1]}), "'sed' is no field"),
        (sweep({"schema_version": [1]}), "no field"),
        (sweep({"seed": list(range(MAX_CELLS + 1))}), "257 cells, at most 256"),
        (sweep({"seed": [0]}) | {"cells": 3}, "cells"),
        ([], "dictionary"),
    ],
)
def test_what_is_no_grid_is_refused(bad: Any, word: str) -> None:
    with pytest.raises(SpecError, match=word):
        parse_sweep(bad)


@pytest.mark.parametrize(
    ("grid", "word"),
    [
        ({"budget.bits": [3, -1]}, r"cell 2 \(budget.bits=-1\): budget.bits"),
        ({"allocation.metod": ["sba"]}, "allocation.metod"),
        ({"seed.first": [1]}, "seed of the job must be an object"),
        ({"budget.bits": [3], "budget.size": [9]}, "bits and budget.size are two budgets"),
        ({"budget": [{"bits": 3}], "budget.size": [9]}, "two budgets"),
        (
            {"calibration.length": [64], "calibration": [{"sequences": 2}]},
            "calibration takes the place of calibration.length",
        ),
    ],
)
def test_a_cell_that_is_no_job_is_named(grid: dict[str, list[Any]], word: str) -> None:
    with pytest.raises(SpecError, match=word):
        parse_sweep(sweep(grid, seed=1)).cells()


def test_cells_of_other_profiles_begin_by_turns() -> None:
    grid = {"calibration.sequences": [8, 16], "budget.bits": [2, 3, 4]}
    cells = parse_sweep(sweep(grid)).cells()
    assert [cell.number for cell in in_turn(cells)] == [1, 4, 2, 5, 3, 6]
