"""The pages as one application, which the API's mounts at /ui.

It answers refusals as pages too: the same problem documents, shown to people. Whether a caller may
see a page was decided before (`http/access.py`), by the scope of the API's path of the same name.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import RedirectResponse

from bitmill_service.api.context import Context
from bitmill_service.http.access import PAGES
from bitmill_service.http.problems import HANDLERS
from bitmill_service.pages import (
    budget,
    compare,
    explorer,
    job,
    jobs,
    operation,
    session,
    shelves,
    static_files,
    submission,
    sweeps,
)
from bitmill_service.pages.rendering import render

HOME = f"{PAGES}/jobs"

entry = APIRouter(include_in_schema=False)


@entry.get("/")
def enter() -> Response:
    """The first page."""
    return RedirectResponse(HOME)


def pages_app(context: Context) -> FastAPI:
    """The application of the pages, on the stores of the API's."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.context = context
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, _as_page(handler))
    app.include_router(session.router)
    app.include_router(static_files.router)
    app.add_api_route("/", enter, methods=["GET"])
    for router in (
        submission.router,
        jobs.router,
        job.router,
        explorer.router,
        budget.router,
        compare.router,
        sweeps.router,
        shelves.router,
        operation.router,
    ):
        app.include_router(router, dependencies=[Depends(refuse_strangers)])
    return app


async def refuse_strangers(request: Request) -> None:
    """Raise what the caller was refused for: no key, or one without the scope."""
    refusal = getattr(request.state, "refusal", None)
    if refusal is not None:
        raise refusal


def _as_page(
    handler: Callable[[Request, Exception], Awaitable[Response]],
) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def show(request: Request, error: Exception) -> Response:
        answer = await handler(request, error)
        problem = json.loads(bytes(answer.body))
        kept = ("retry-after", "allow", "www-authenticate")
        headers = {name: answer.headers[name] for name in kept if name in answer.headers}
        template = "sign_in.html" if answer.status_code == 401 else "problem.html"
        return render(
            request,
            template,
            status=answer.status_code,
            headers=headers,
            problem=problem,
            back=request.url.path,
        )

    return show
