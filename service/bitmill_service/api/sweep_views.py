"""A sweep as clients see it, with its cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import product

from bitmill.results import QualityReport
from bitmill_service import schemas
from bitmill_service.api.views import job_view, moment
from bitmill_workers.store.records import JobRecord, SweepRecord
from bitmill_workers.store.states import TERMINAL
from bitmill_workers.sweep_spec import SweepSpec


def sweep_view(
    sweep: SweepRecord, jobs: Mapping[int, JobRecord], *, whole: bool = True
) -> schemas.SweepView:
    """One sweep; jobs: the newest of each cell by its number; whole: with cells."""
    spec = SweepSpec.model_validate(sweep.spec)
    cells = _cells(spec, jobs)
    base, created = f"/v1/sweeps/{sweep.id}", moment(sweep.created_at)
    assert created is not None
    return schemas.SweepView(
        id=sweep.id,
        label=sweep.label,
        created_at=created,
        created_by=sweep.created_by,
        finished=all(cell.state in (*TERMINAL, "deleted") for cell in cells),
        counts=dict(sorted(Counter(cell.state for cell in cells).items())),
        axes=list(spec.grid),
        spec=sweep.spec if whole else None,
        cells=cells if whole else None,
        links=schemas.SweepLinks.model_validate(
            {"self": base} | {name: f"{base}/{name}" for name in ("cancel", "table", "plot")}
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
    found = (job.result or {}).get("quality")
    quality = None if not found else QualityReport.model_validate(found)
    spent = (job.started_at, job.finished_at)
    return schemas.CellView(
        cell=number,
        values=values,
        state=shown.state,
        job_id=job.id,
        stage=shown.stage,
        progress=shown.progress,
        quality=quality.rows[1] if quality and len(quality.rows) > 1 else None,
        seconds=None if None in spent else round(spent[1] - spent[0], 3),  # type: ignore[operator]
        alone_s=round(sum(quality.seconds.values()), 3) if quality else None,
        error=shown.error,
    )
