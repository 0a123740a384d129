"""Sweeps: the list, and one with its cells as they come."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse
from markupsafe import Markup

from bitmill_service.api.context import ContextDep, JobCursor, PrincipalDep
from bitmill_service.api.events import Position
from bitmill_service.api.routes import sweeps as api
from bitmill_service.http.access import PAGES
from bitmill_service.pages.rendering import render

router = APIRouter()


@router.get("/sweeps")
def show_sweeps(
    request: Request,
    context: ContextDep,
    caller: PrincipalDep,
    after: Annotated[JobCursor | None, Query()] = None,
) -> Response:
    """Sweeps, newest first."""
    return render(request, "sweeps.html", page=api.list_sweeps(context, caller, after=after))


@router.get("/sweeps/{sweep_id}")
def show_sweep(
    request: Request, sweep_id: api.SweepId, context: ContextDep, caller: PrincipalDep
) -> Response:
    """The cells of a sweep, what they found and the plot."""
    # Before the cells are read, so that no event lies between.
    position = Position.now(context.sweeps.ends(sweep_id))
    sweep = api.get_sweep(sweep_id, context, caller)
    cells = sweep.cells or []
    measured = [cell.quality for cell in cells if cell.quality is not None]
    picture = sweep.table.to_svg()
    return render(
        request,
        "sweep.html",
        sweep=sweep,
        cells=cells,
        texts=list(dict.fromkeys(text for quality in measured for text in quality.texts)),
        plot=None if picture is None else Markup(picture),
        position=position,
    )


@router.post("/sweeps/{sweep_id}/cancel")
def cancel(sweep_id: api.SweepId, context: ContextDep, caller: PrincipalDep) -> Response:
    """Stop every job of the sweep that has not finished."""
    api.cancel_sweep(sweep_id, context, caller)
    return RedirectResponse(f"{PAGES}/sweeps/{sweep_id}", 303)


@router.post("/sweeps/{sweep_id}/delete")
def delete(sweep_id: api.SweepId, context: ContextDep, caller: PrincipalDep) -> Response:
    """Remove a finished sweep with its jobs and their files."""
    api.delete_sweep(sweep_id, context, caller)
    return RedirectResponse(f"{PAGES}/sweeps", 303)
