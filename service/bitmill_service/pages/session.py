"""Signing in: the browser keeps an API key as a cookie that no script and no other site can use.

The cookie is `HttpOnly`, `SameSite=Strict` and, where the browser came over https, `Secure`; it
lasts a working day. Nothing is kept on the server: signing out forgets the cookie, revoking the key
ends it everywhere. Cookies know no ports: whatever else serves pages at the same host name gets it
too, so a service that has keys deserves a name of its own.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from bitmill_service.api.context import ContextDep
from bitmill_service.http.access import COOKIE, PAGES
from bitmill_service.pages.forms import Form, text
from bitmill_service.pages.rendering import render

SESSION_S = 8 * 3600
_HOME = f"{PAGES}/jobs"

router = APIRouter()


@router.get("/sign-in")
def show_sign_in(request: Request) -> Response:
    """The form."""
    return render(request, "sign_in.html", problem=None, back=_HOME)


@router.post("/sign-in")
async def sign_in(request: Request, context: ContextDep, form: Form) -> Response:
    """Take a key that works, and go on to the page that was asked for."""
    key, back = text(form, "key"), _own_page(text(form, "back"))
    if await context.keys.holder(key) is None:
        problem = {"detail": "This key is unknown, mistyped, expired or revoked."}
        return render(request, "sign_in.html", status=401, problem=problem, back=back)
    answer = RedirectResponse(back, 303)
    answer.set_cookie(
        COOKIE, key, max_age=SESSION_S, httponly=True, samesite="strict", secure=_over_tls(request)
    )
    return answer


@router.post("/sign-out")
def sign_out(request: Request) -> Response:
    """Forget the key."""
    answer = RedirectResponse(f"{PAGES}/sign-in", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=_over_tls(request))
    return answer


def _over_tls(request: Request) -> bool:
    """Whether the browser speaks https, be it to a proxy in front."""
    return request.url.scheme == "https" or request.headers.get("origin", "").startswith("https:")


def _own_page(address: str) -> str:
    """The address where it is a page of this service, else the first page."""
    return address if address.startswith(f"{PAGES}/") and "\\" not in address else _HOME
