"""For who runs the service: workers with their queues, and API keys."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import ValidationError

from bitmill_service.api.context import ContextDep, PrincipalDep
from bitmill_service.api.routes import keys as keys_api
from bitmill_service.api.routes import workers as workers_api
from bitmill_service.http.access import PAGES
from bitmill_service.pages.forms import Form, text
from bitmill_service.pages.rendering import render
from bitmill_service.schemas import KeyRequest, NewKeyView

router = APIRouter()

_DAY_S = 86400


@router.get("/workers")
def show_workers(request: Request, context: ContextDep) -> Response:
    """Queues, and the workers that were seen within a minute."""
    return render(request, "workers.html", shown=workers_api.list_workers(context))


@router.post("/workers/queues/{queue}/{act}")
def change_queue(
    queue: workers_api.QueueName,
    act: Literal["pause", "resume"],
    context: ContextDep,
    caller: PrincipalDep,
) -> Response:
    """Give out no more jobs of a queue, or again."""
    if act == "pause":
        workers_api.pause_queue(queue, context, caller)
    else:
        workers_api.resume_queue(queue, context)
    return RedirectResponse(f"{PAGES}/workers", 303)


@router.post("/workers/{name}/{act}")
def change_worker(
    name: workers_api.WorkerName,
    act: Literal["drain", "resume"],
    context: ContextDep,
    caller: PrincipalDep,
) -> Response:
    """Let a worker take no more jobs, or again."""
    if act == "drain":
        workers_api.drain_worker(name, context, caller)
    else:
        workers_api.resume_worker(name, context)
    return RedirectResponse(f"{PAGES}/workers", 303)


@router.get("/keys")
def show_keys(request: Request, context: ContextDep) -> Response:
    """All keys, and a form for another."""
    return _keys(request, context)


@router.post("/keys")
def create_key(request: Request, context: ContextDep, caller: PrincipalDep, form: Form) -> Response:
    """Make a key and show it this once."""
    days = text(form, "days")
    try:
        asked = KeyRequest.model_validate(
            {
                "name": text(form, "name"),
                "tenant": text(form, "tenant") or None,
                "scopes": form.getlist("scope"),
                "expires_in_s": float(days) * _DAY_S if days else None,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return _keys(request, context, problem=f"{where}: {first['msg']}", status=422)
    except ValueError:
        return _keys(request, context, problem=f"{days[:80]!r} is no number of days", status=422)
    return _keys(request, context, made=keys_api.create_key(asked, context, caller, Response()))


@router.post("/keys/{key_id}/revoke")
def revoke_key(key_id: keys_api.KeyId, context: ContextDep) -> Response:
    """End a key."""
    keys_api.revoke_key(key_id, context)
    return RedirectResponse(f"{PAGES}/keys", 303)


def _keys(
    request: Request,
    context: ContextDep,
    *,
    made: NewKeyView | None = None,
    problem: str | None = None,
    status: int = 200,
) -> Response:
    found = keys_api.list_keys(context)
    return render(request, "keys.html", status=status, keys=found.keys, made=made, problem=problem)
