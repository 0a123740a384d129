"""The list of jobs: filters, states as they change, and cancelling several at once."""

from __future__ import annotations

from typing import Annotated, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse

from bitmill.errors import BitmillError
from bitmill_service.api.context import ID_PATTERN, ContextDep, PrincipalDep
from bitmill_service.api.routes import jobs as api
from bitmill_service.http.access import PAGES
from bitmill_service.pages.forms import Form
from bitmill_service.pages.rendering import render
from bitmill_workers.store.states import ShownState

PAGE = 50

router = APIRouter()


@router.get("/jobs")
def show_jobs(
    request: Request,
    context: ContextDep,
    caller: PrincipalDep,
    state: Annotated[ShownState | None, Query()] = None,
    model: Annotated[str, Query(max_length=4200)] = "",
    label: Annotated[str, Query(max_length=200)] = "",
    after: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
) -> Response:
    """Jobs, newest first."""
    page = api.list_jobs(
        context, caller, state=state, model=model, label=label, limit=PAGE, after=after
    )
    filters = {"state": state or "", "model": model, "label": label}
    further = urlencode({**{k: v for k, v in filters.items() if v}, "after": page.next or ""})
    return render(
        request,
        "jobs.html",
        jobs=page.jobs,
        filters=filters,
        states=get_args(ShownState),
        further=further if page.next else None,
        live=any(not job.terminal for job in page.jobs),
    )


@router.post("/jobs/cancel")
def cancel_jobs(context: ContextDep, caller: PrincipalDep, form: Form) -> Response:
    """Cancel the jobs that were ticked; what cannot be cancelled is counted, not fatal."""
    stopped, refused = 0, 0
    for job_id in form.getlist("job"):
        try:
            api.cancel_job(str(job_id), context, caller)
            stopped += 1
        except BitmillError:
            refused += 1
    told = urlencode({"cancelled": stopped, "refused": refused})
    return RedirectResponse(f"{PAGES}/jobs?{told}", 303)
