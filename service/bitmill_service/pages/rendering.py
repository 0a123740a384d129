"""How pages are made: Jinja templates, and the headers that go with every page.

Templates write values escaped; scripts and styles come from this host's files alone, which the
policy below makes browsers enforce. A page says who is signed in and hides what the key may not.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from bitmill.errors import advice
from bitmill.results import with_error
from bitmill_service.http.access import Principal
from bitmill_service.pages.static_files import static
from bitmill_service.schemas import CellView, JobView, WorkerView
from bitmill_service.units import format_size

POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
"""Content-Security-Policy of every page: nothing inline, nothing from another host."""

NAVIGATION = (
    ("Jobs", "/ui/jobs"),
    ("New job", "/ui/jobs/new"),
    ("Sweeps", "/ui/sweeps"),
    ("Compare", "/ui/compare"),
    ("Profiles", "/ui/profiles"),
    ("Maps", "/ui/bit-width-maps"),
    ("Uploads", "/ui/uploads"),
    ("Workers", "/ui/workers"),
    ("Keys", "/ui/keys"),
    ("API", "/docs"),
)
"""Name and address of what every page leads to."""

_HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    # With the API's stricter one, browsers would send `Origin: null` with the pages' own forms.
    "Referrer-Policy": "same-origin",
}


def render(
    request: Request,
    template: str,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    **values: Any,
) -> HTMLResponse:
    """A page made of a template and these values."""
    caller: Principal | None = getattr(request.state, "principal", None)
    text = _templates.get_template(template).render(
        caller=caller,
        path=request.url.path,
        query=request.query_params,
        now=datetime.now(UTC),
        **values,
    )
    return HTMLResponse(text, status, headers={**_HEADERS, **(headers or {})})


def duration(seconds: float | timedelta) -> str:
    """A time span in its two largest units, such as "2 h 5 min"."""
    if isinstance(seconds, timedelta):
        seconds = seconds.total_seconds()
    if 0 < seconds < 1:
        return "under 1 s"
    left = round(max(0.0, seconds))
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= length or (unit == "s" and not parts):
            parts.append(f"{left // length} {unit}")
            left %= length
        elif parts:
            break
    return " ".join(parts[:2])


def moment(time: datetime) -> str:
    """A time for people, in UTC."""
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def target(spec: Mapping[str, Any]) -> str:
    """What a job aims at, such as "3 bits", "size 1.2 GB", "as gguf" or "to ORG/NAME"."""
    if "budget" not in spec:
        return f"as {spec['format']}" if "format" in spec else f"to {spec['repo_id']}"
    kinds = {name: value for name, value in spec["budget"].items() if value is not None}
    for kind in ("size", "memory"):
        if kind in kinds:
            return f"{kind} {format_size(kinds[kind])}"
    if "max_loss_increase" in kinds:
        return f"KL of at most {kinds['max_loss_increase']:g}"
    kind = "code_bits" if "code_bits" in kinds else "bits"
    return f"{kinds[kind]:g} {kind.replace('_', ' ')}"


def model(reference: Mapping[str, Any]) -> str:
    """The name of a job's model."""
    name = reference.get("repo_id") or reference.get("path") or f"upload {reference['upload_id']}"
    return f"{name}, {reference['file']}" if reference.get("file") else str(name)


def share(job: JobView | WorkerView | CellView) -> int | None:
    """Percent of the current stage that is done."""
    if job.progress is None or job.progress.total <= 0:
        return None
    return min(100, 100 * job.progress.done // job.progress.total)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bitmill_service.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["contains"] = lambda several, one: one in several
    environment.globals |= {"static": static, "pages": NAVIGATION, "with_error": with_error}
    environment.filters["size"] = format_size
    for filter in (advice, duration, moment, target, model, share):
        environment.filters[filter.__name__] = filter
    return environment


_templates = _environment()
