"""A sweep as clients see it, with its cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product

from bitmill.results import QualityRow
from bitmill_service import schemas
from bitmill_service.api.views import job_view, moment
from bitmill_workers.store.records import JobRecord, SweepRecord
from bitmill_workers.store.states import TERMINAL, ShownState
from bitmill_workers.sweep_spec import SweepSpec


def sweep_line(sweep: SweepRecord, states: Mapping[int, ShownState]) -> schemas.SweepView:
    """One sweep without its cells; states: of the newest job of each by its number."""
    spec = SweepSpec.model_validate(sweep.spec)
    numbers = range(1, spec.size + 1)
    return _view(sweep, spec, [states.get(number, "deleted") for number in numbers])


def sweep_view(sweep: SweepRecord, jobs: Mapping[int, JobRecord]) -> schemas.SweepView:
    """One sweep with its cells; jobs: the newest of each by its number."""
    spec = SweepSpec.model_validate(sweep.spec)
    cells = _cells(spec, jobs)
    view = _view(sweep, spec, [cell.state for cell in cells])
    return view.model_copy(update={"spec": sweep.spec, "cells": cells})


def _view(
    sweep: SweepRecord, spec: SweepSpec, states: Sequence[schemas.CellState]
) -> schemas.SweepView:
    base, created = f"/v1/sweeps/{sweep.id}", moment(sweep.created_at)
    assert created is not None
    return schemas.SweepView(
        id=sweep.id,
        label=sweep.label,
        created_at=created,
        created_by=sweep.created_by,
        finished=all(state in (*TERMINAL, "deleted") for state in states),
        counts=dict(sorted(Counter(states).items())),
        axes=list(spec.grid),
        links=schemas.SweepLinks.model_validate(
            {"self": base}
            | {name: f"{base}/{name}" for name in ("cancel", "events", "table", "plot")}
        ),
    )


def _cells(spec: SweepSpec, jobs: Mapping[int, JobRecord]) -> list[schemas.CellView]:
    return [
        _cell(number, dict(zip(spec.grid, values, strict=True)), jobs.get(number))
        for number, values in enumerate(product(*spec.grid.values()), 1)
    ]


def _cell(number: int, values: dict[str, object], job: JobRecord | None) -> schemas.CellView:
    if job is None:
        return schemas.CellView(cell=number, values=values, state="deleted")
    shown = job_view(job)
    # Not the whole report, which has a part for every linear.
    found = (job.result or {}).get("quality") or {}
    rows = found.get("rows", [])[1:2]
    ends = (job.started_at, job.finished_at)
    return schemas.CellView(
        cell=number,
        values=values,
        state=shown.state,
        job_id=job.id,
        stage=shown.stage,
        progress=shown.progress,
        quality=QualityRow.model_validate(rows[0]) if rows else None,
        seconds=None if None in ends else round(ends[1] - ends[0], 3),  # type: ignore[operator]
        alone_s=round(sum(found["seconds"].values()), 3) if rows else None,
        error=shown.error,
    )
