"""The list of jobs: filters, states as they change, and acts on several at once."""

from __future__ import annotations

from typing import Annotated, Literal, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import RedirectResponse

from bitmill.errors import BitmillError
from bitmill_service.api.context import Context, ContextDep, JobCursor, PrincipalDep
from bitmill_service.api.routes import jobs as api
from bitmill_service.http.access import PAGES, Principal
from bitmill_service.http.problems import ProblemError
from bitmill_service.pages.forms import Form
from bitmill_service.pages.rendering import render
from bitmill_workers.store.states import ShownState

PAGE = 50
Act = Literal["cancel", "retry", "delete"]
_DONE: dict[Act, str] = {"cancel": "cancelled", "retry": "retried", "delete": "deleted"}

router = APIRouter()


@router.get("/jobs")
def show_jobs(
    request: Request,
    context: ContextDep,
    caller: PrincipalDep,
    state: Annotated[ShownState | None, Query()] = None,
    model: Annotated[str, Query(max_length=4200)] = "",
    label: Annotated[str, Query(max_length=200)] = "",
    after: Annotated[JobCursor | None, Query()] = None,
    act: Annotated[Act | None, Query()] = None,
    done: Annotated[int, Query(ge=0)] = 0,
    refused: Annotated[int, Query(ge=0)] = 0,
    why: Annotated[str, Query(pattern="^[a-z_,]{1,200}$")] = "",
) -> Response:
    """Jobs, newest first; `act` and what follows: what came of an act on several."""
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
        said=None if act is None else (done, _DONE[act], refused, why.split(",")),
    )


@router.post("/jobs/{act}")
def act_on_jobs(
    act: Annotated[Act, Path()], context: ContextDep, caller: PrincipalDep, form: Form
) -> Response:
    """Do this to the jobs that were ticked; those that refuse are counted, not fatal."""
    done, refused = 0, []
    for job_id in form.getlist("job"):
        try:
            _act(act, str(job_id), context, caller)
            done += 1
        except (BitmillError, ProblemError) as error:
            refused.append(error.code)
    told: dict[str, object] = {"act": act, "done": done, "refused": len(refused)}
    if refused:
        told["why"] = ",".join(sorted(set(refused)))
    return RedirectResponse(f"{PAGES}/jobs?{urlencode(told)}", 303)


def _act(act: Act, job_id: str, context: Context, caller: Principal) -> None:
    match act:
        case "cancel":
            api.cancel_job(job_id, context, caller)
        case "retry":
            api.retry_job(context.jobs.get(job_id, tenant=caller.sees), context, caller)
        case "delete":
            api.delete_job(job_id, context, caller)
