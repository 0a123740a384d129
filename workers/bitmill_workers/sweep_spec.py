"""Sweep specification: a job specification and a grid of values for some of its fields. Torch-free.

    {"job": {"model": {...}}, "grid": {"calibration.text": [A, B], "budget.bits": [2.5, 3, 4]}}

Every cell of the grid is a job: the common specification with one value of each axis in its place.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from typing import Any, Literal

from pydantic import Field, field_validator

from bitmill.config.closed import Closed
from bitmill.config.quantization import KINDS, parse_part
from bitmill.errors import SpecError
from bitmill_workers.job_spec import JobSpec, parse_spec

MAX_CELLS = 256
_BUDGETS = frozenset(f"budget.{kind}" for kind in KINDS)
_PROFILED = ("model", "calibration", "allocation", "code", "seed", "threads", "devices")
"""Fields of a job, with what is below them, on which its sensitivity profile depends."""


@dataclass(frozen=True)
class Cell:
    """One job of a sweep. number: from 1, in the order of the grid; values: of its axes."""

    number: int
    values: Mapping[str, Any]
    spec: JobSpec

    @property
    def name(self) -> str:
        """Number and values in words."""
        return named(self.number, self.values)


class SweepSpec(Closed):
    """job: what all cells have in common, a `JobSpec` that lacks what the grid gives.

    grid: path of a field, such as "budget.bits", and the values that it takes. label: of the sweep
    and of those of its jobs that have none.
    """

    schema_version: Literal[1] = 1
    label: str | None = Field(default=None, max_length=200)
    job: dict[str, Any] = Field(default={})
    grid: dict[str, list[Any]] = Field(min_length=1, max_length=16)

    @field_validator("grid")
    @classmethod
    def _finite(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for path, values in grid.items():
            root = path.partition(".")[0]
            if root not in JobSpec.model_fields or root == "schema_version":
                known = ", ".join(name for name in JobSpec.model_fields if name != "schema_version")
                raise ValueError(f"{path!r} is no field of a job: an axis begins with {known}")
            if not values:
                raise ValueError(f"{path} has no values: give at least one")
            told = [value_text(value) for value in values]
            if twice := sorted({value for value in told if told.count(value) > 1}):
                raise ValueError(f"{path} has {twice[0]} twice: give each value once")
        if (count := math.prod(map(len, grid.values()))) > MAX_CELLS:
            raise ValueError(f"the grid has {count:,} cells, at most {MAX_CELLS} may be")
        return grid

    @property
    def size(self) -> int:
        """How many cells there are."""
        return math.prod(map(len, self.grid.values()))

    def cells(self) -> tuple[Cell, ...]:
        """Every job of the sweep, the last axis varying fastest.

        Raises `SpecError` naming a cell that is no job, or axes that take one another's place.
        """
        _check_overlaps(list(self.grid))
        found = []
        for number, chosen in enumerate(product(*self.grid.values()), 1):
            values = dict(zip(self.grid, chosen, strict=True))
            try:
                found.append(Cell(number, values, parse_spec(self._job(values))))
            except SpecError as error:
                raise SpecError(
                    f"{named(number, values)}: {error.message}", code=error.code, param=error.param
                ) from error
        return tuple(found)

    def _job(self, values: Mapping[str, Any]) -> dict[str, Any]:
        job: dict[str, Any] = json.loads(json.dumps(self.job))
        if self.label is not None:
            job.setdefault("label", self.label)
        for path, value in values.items():
            *parents, name = path.split(".")
            part = job
            for parent in parents:
                inner = part.setdefault(parent, {})
                if not isinstance(inner, dict):
                    raise SpecError(f"{parent} of the job must be an object", param=parent)
                part = inner
            if parents == ["budget"] and name in KINDS:
                for kind in KINDS:
                    part.pop(kind, None)
            part[name] = value
        return job


def _check_overlaps(paths: Sequence[str]) -> None:
    """Raise `SpecError` where an axis takes the place of what another one set."""
    for number, path in enumerate(paths):
        within = [earlier for earlier in paths[:number] if earlier.startswith(f"{path}.")]
        if within:
            raise SpecError(
                f"grid: {path} takes the place of {within[0]}: give {path} before it", param="grid"
            )
    budgets = [path for path in paths if path == "budget" or path in _BUDGETS]
    if len(budgets) > 1:
        raise SpecError(
            f"grid: {budgets[0]} and {budgets[1]} are two budgets of a job: give one axis, "
            "'budget', with a list of objects",
            param="grid",
        )


def parse_sweep(data: object) -> SweepSpec:
    """Build a `SweepSpec` from decoded JSON or YAML; raises `SpecError`."""
    return parse_part(SweepSpec, data)


def in_turn(cells: Sequence[Cell]) -> Iterator[Cell]:
    """Cells in the order in which they are best begun: those of other profiles by turns.

    So several workers make one profile each instead of waiting for the same.
    """
    groups: defaultdict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        spec = cell.spec.model_dump(mode="json")
        groups[value_text({name: spec.get(name) for name in _PROFILED})].append(cell)
    for turn in zip_longest(*groups.values()):
        yield from (cell for cell in turn if cell is not None)


def value_text(value: Any) -> str:
    """A value of an axis as it is shown: text as it is, anything else as compact JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def named(number: int, values: Mapping[str, Any]) -> str:
    """A cell in words."""
    told = ", ".join(f"{path}={value_text(value)}" for path, value in values.items())
    return f"cell {number} ({told})"
