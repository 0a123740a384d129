"""A job's map: the page of the explorer, whose table needs no script."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.reporting.charts import block_places, short_name
from bitmill.results import QualityReport
from bitmill_service.api.context import ContextDep, JobDep
from bitmill_service.api.routes import job_outputs as outputs
from bitmill_service.api.routes import jobs as api
from bitmill_service.pages.rendering import render

router = APIRouter()


@dataclass(frozen=True)
class WidthTable:
    """Mean widths of blocks (rows, by their numbers) and modules; None where there is no linear."""

    modules: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]
    linears: int
    groups: int
    outliers: int

    @classmethod
    def of(cls, found: BitWidthMap, report: QualityReport) -> WidthTable:
        """Means over weights where the report has them, else over groups."""
        means = {name: sum(widths) / len(widths) for name, widths in found.linears.items()}
        means |= {one.name: one.code_bits for one in report.linears if one.name in means}
        places = block_places(found.linears)
        blocks = dict.fromkeys(block for block, _ in places)
        modules = dict.fromkeys(module for _, module in places)
        cells = {
            place: sum(means[n] for n in names) / len(names) for place, names in places.items()
        }
        return cls(
            tuple(short_name(module) for module in modules),
            tuple(
                (block.rpartition(".")[2] or "–", tuple(cells.get((block, m)) for m in modules))
                for block in blocks
            ),
            len(found.linears),
            sum(map(len, found.linears.values())),
            sum(found.outliers.values()),
        )


@router.get("/jobs/{job_id}/map")
def show_map(request: Request, job: JobDep, context: ContextDep) -> Response:
    """The explorer of a finished job's map."""
    found = BitWidthMap.model_validate_json(bytes(outputs.read_map(job, context).body))
    report = QualityReport.model_validate_json(bytes(outputs.read_report(job, context).body))
    return render(
        request, "map.html", job=api.shown(context, job), table=WidthTable.of(found, report)
    )
