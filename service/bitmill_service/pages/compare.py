"""Jobs side by side: size against quality with the Pareto line, and their reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from markupsafe import Markup
from pydantic import StringConstraints

from bitmill.reporting.charts import Series, line_chart
from bitmill.results import QualityReport, QualityRow, TextQuality, with_error
from bitmill_service.api.context import ID_PATTERN, Context, ContextDep, PrincipalDep
from bitmill_service.api.routes import job_outputs as outputs
from bitmill_service.api.routes import jobs as api
from bitmill_service.http.access import Principal
from bitmill_service.pages.rendering import duration, model, render, target
from bitmill_service.schemas import JobView
from bitmill_service.units import format_size

MOST = 20
_OFFERED = 50
_JOBS, _BASELINES, _PARETO = "#2f81c7", "#8a8f98", "#d95f02"

router = APIRouter()


@dataclass(frozen=True)
class Compared:
    """A finished job with its number on the page and its report."""

    number: int
    job: JobView
    report: QualityReport

    @property
    def row(self) -> QualityRow | None:
        """What was measured of the job's checkpoint; None where nothing was."""
        return next((row for row in self.report.rows if row.method != "source"), None)

    @property
    def name(self) -> str:
        """The label, or the end of the id."""
        return self.job.label or self.job.id[-12:]


@dataclass(frozen=True)
class Measure:
    """Something that was measured of a text: smaller is better. `error` is its standard error."""

    title: str
    value: str
    error: str

    def of(self, quality: TextQuality) -> tuple[float, float]:
        """Value and standard error."""
        return getattr(quality, self.value), getattr(quality, self.error)


MEASURES = (
    Measure("perplexity", "perplexity", "perplexity_se"),
    Measure("KL, nats per token", "kl", "kl_se"),
)


@router.get("/compare")
def show_comparison(
    request: Request,
    context: ContextDep,
    caller: PrincipalDep,
    job: Annotated[
        list[Annotated[str, StringConstraints(pattern=ID_PATTERN)]], Query(max_length=MOST)
    ] = [],  # noqa: B006
) -> Response:
    """The jobs that were chosen, and others to choose from."""
    chosen = list(_chosen(context, caller, dict.fromkeys(job)))
    texts = list(dict.fromkeys(t for one in chosen if one.row for t in one.row.texts))
    charts = [(text, m, chart(chosen, text, m)) for text in texts for m in MEASURES]
    finished = api.list_jobs(context, caller, state="succeeded", limit=_OFFERED).jobs
    return render(
        request,
        "compare.html",
        chosen=chosen,
        offered=[one for one in finished if one.kind == "quantize"],
        texts=texts,
        charts=[(text, m.title, Markup(svg)) for text, m, svg in charts if svg],
        best={text: pareto(chosen, text, MEASURES[1]) for text in texts},
        side_by_side=list(_side_by_side(chosen)),
        one_model=len({model(one.job.model) for one in chosen}) < 2,
    )


def _chosen(context: Context, caller: Principal, ids: Mapping[str, None]) -> Iterator[Compared]:
    for number, job_id in enumerate(ids, 1):
        record = context.jobs.get(job_id, tenant=caller.sees)
        report = bytes(outputs.read_report(record, context).body)
        yield Compared(
            number, api.shown(context, record), QualityReport.model_validate_json(report)
        )


def pareto(chosen: Sequence[Compared], text: str, measure: Measure) -> list[int]:
    """Numbers of the jobs that no other beats in both size and this measure, the smallest first."""
    points = sorted((x, y, number) for x, y, _, number in _points(chosen, text, measure))
    best: list[int] = []
    least = float("inf")
    for _, y, number in points:
        if y < least:
            best.append(number)
            least = y
    return best


def chart(chosen: Sequence[Compared], text: str, measure: Measure) -> str:
    """SVG of size against this measure; empty where fewer than two jobs have it."""
    points = list(_points(chosen, text, measure))
    if len(points) < 2:
        return ""
    mega = [(x / 1e6, y, error, number) for x, y, error, number in points]
    front = pareto(chosen, text, measure)
    line = sorted((x, y) for x, y, _, number in mega if number in front)
    baselines = {
        (row.size / 1e6, measure.of(row.texts[text])[0], row.method)
        for one in chosen
        for row in one.report.rows[2:]
        if row.size and text in row.texts
    }
    series = [
        Series("Pareto line", tuple(line), _PARETO, line=True),
        Series(
            "baselines",
            tuple((x, y) for x, y, _ in sorted(baselines)),
            _BASELINES,
            labels=tuple(name for *_, name in sorted(baselines)),
            below=True,
        ),
        Series(
            "jobs",
            tuple((x, y) for x, y, *_ in mega),
            _JOBS,
            labels=tuple(str(number) for *_, number in mega),
            errors=tuple(error for _, _, error, _ in mega),
        ),
    ]
    return line_chart(series, x_title="size of all files, MB", y_title=f"{measure.title}, {text}")


def _points(
    chosen: Sequence[Compared], text: str, measure: Measure
) -> Iterator[tuple[int, float, float, int]]:
    """(size, value, standard error, number) of the jobs that have it."""
    for one in chosen:
        if one.row and one.row.size and text in one.row.texts:
            yield one.row.size, *measure.of(one.row.texts[text]), one.number


def _side_by_side(chosen: Sequence[Compared]) -> Iterator[tuple[str, list[str]]]:
    """Lines of a table with a column for each job: what it was asked, and what its report says."""
    lines: dict[str, dict[int, str]] = {}
    for one in chosen:
        for name, value in _facts(one):
            lines.setdefault(name, {})[one.number] = value
    for name, values in lines.items():
        yield name, [values.get(one.number, "–") for one in chosen]


def _facts(one: Compared) -> Iterator[tuple[str, str]]:
    spec, report, row = one.job.spec, one.report, one.row
    yield "model", model(one.job.model)
    yield "target", target(spec)
    for part in ("allocation", "refinement"):
        yield part, _name(spec.get(part))
    for member in ("code", "effort", "seed"):
        if spec.get(member) is not None:
            yield member, str(spec[member])
    if row is not None:
        yield "method", row.method
        if row.bits is not None:
            yield "bits (codes)", f"{row.bits:.3f} ({row.code_bits:.3f})"
        if row.size is not None:
            yield "size", f"{format_size(row.size)} ({row.size:,} bytes)"
        if row.predicted_loss is not None:
            yield "predicted loss", f"{row.predicted_loss:.4f}"
        for text, found in row.texts.items():
            yield f"perplexity, {text}", with_error(found.perplexity, found.perplexity_se, ".3f")
            yield f"KL, {text}", with_error(found.kl, found.kl_se, ".4f")
            yield (
                f"increase of the loss, {text}",
                with_error(found.loss_increase, found.loss_increase_se, ".4f"),
            )
            yield f"top-1 agreement, {text}", f"{100 * found.top1_agreement:.1f} %"
            yield f"tokens, {text}", f"{found.tokens:,}"
    if report.linears:
        worst = max(report.linears, key=lambda linear: linear.relative_error)
        mean = sum(linear.relative_error for linear in report.linears) / len(report.linears)
        yield "mean error of linears", f"{mean:.4g}"
        yield "worst linear", f"{worst.name}: {worst.relative_error:.4g}"
    if report.seconds:
        yield "time", duration(sum(report.seconds.values()))
    yield "warnings", str(len(report.warnings))


def _name(part: Any) -> str:
    return str(part.get("method", "–")) if isinstance(part, Mapping) else str(part or "–")
