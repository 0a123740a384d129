"""A new job: a form whose plan is shown while it is filled in, and clones of earlier jobs.

The form has fields for what is asked most; `more` takes any other part of a specification as JSON,
over the fields. A clone fills the fields from the earlier job and puts the rest there.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, get_args

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse

from bitmill.config.codes import CodeName
from bitmill.config.effort import Effort
from bitmill.config.quantization import KINDS
from bitmill.errors import BitmillError, InputError, advice
from bitmill.io import bounded_json
from bitmill.io.atomic import sha256_json
from bitmill_service.api.admission import admit, plan_view
from bitmill_service.api.context import ID_PATTERN, Context, ContextDep, PrincipalDep
from bitmill_service.api.routes import jobs as api
from bitmill_service.http.access import PAGES, Principal
from bitmill_service.http.problems import ProblemError, status_and_hint
from bitmill_service.pages.forms import Form, text
from bitmill_service.pages.rendering import render
from bitmill_service.schemas import PlanView
from bitmill_service.units import parse_size
from bitmill_workers.job_spec import JobAllocation, JobSpec, parse_spec, parse_stored

SOURCES = {"hub": "repo_id", "path": "path", "upload": "upload_id"}
"""Kinds of models and the member that names one."""
KIND_WORDS = {
    "bits": "bits a weight, with scales",
    "code_bits": "bits a weight, codes alone",
    "size": "size of the files",
    "memory": "memory where it runs",
    "max_loss_increase": "loss: KL, nats a token",
}
METHODS = ("knapsack", "sba", "uniform")
"""Allocations that need nothing else."""
DEFAULTS = {
    "source": "hub",
    "name": "",
    "revision": "main",
    "file": "",
    "kind": "bits",
    "value": "3",
    "context": "4096",
    "effort": "fast",
    "code": "auto",
    "method": "knapsack",
    "embeddings": "keep",
    "sequences": "",
    "length": "2048",
    "label": "",
    "priority": "0",
    "more": "",
}
"""Fields and what they hold at first; without `sequences` there are as many as by the effort."""

_ONCE = re.compile(r"[0-9a-f]{32}")

router = APIRouter()


@router.get("/jobs/new")
def show_form(
    request: Request,
    context: ContextDep,
    caller: PrincipalDep,
    like: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
) -> Response:
    """The form; `like`: filled in as this job was. Fields may be given by their names, too."""
    fields = dict(DEFAULTS)
    if like is not None:
        job = context.jobs.get(like, tenant=caller.sees)
        spec = parse_stored(job.kind, job.spec)
        if not isinstance(spec, JobSpec):
            raise ProblemError("state_conflict", f"job {job.id} is an {job.kind}, not a new result")
        fields |= fields_of(spec)
    fields |= {name: value for name, value in request.query_params.items() if name in fields}
    return _form(request, fields)


@router.post("/jobs/new")
def show_plan(request: Request, context: ContextDep, caller: PrincipalDep, form: Form) -> Response:
    """The form again, with the plan of what it asks for, or what is wrong with it."""
    fields = _fields(form)
    try:
        spec = parse_spec(specification(fields))
        plan = plan_view(admit(context, spec, caller))
    except (BitmillError, ProblemError) as error:
        return _form(request, fields, error=error)
    return _form(request, fields, spec=spec, plan=plan)


@router.post("/jobs")
def submit(request: Request, context: ContextDep, caller: PrincipalDep, form: Form) -> Response:
    """Submit the job and show it; sent twice, the same form gives one job."""
    fields = _fields(form)
    try:
        job_path = _submit(context, caller, fields, text(form, "once"))
    except (BitmillError, ProblemError) as error:
        return _form(request, fields, error=error, status=_status(error))
    return RedirectResponse(PAGES + job_path.removeprefix("/v1"), 303)


def specification(fields: Mapping[str, str]) -> dict[str, Any]:
    """The specification as JSON that the fields ask for; raises `InputError` naming a field."""
    source, kind = fields["source"], fields["kind"]
    if source not in SOURCES or kind not in KINDS:
        raise InputError("the form was not made by this page", param="source")
    model: dict[str, Any] = {"source": source, SOURCES[source]: fields["name"]}
    if source == "hub":
        model["revision"] = fields["revision"] or "main"
    if fields["file"]:
        model["file"] = fields["file"]
    budget: dict[str, Any] = {kind: _amount(fields)}
    if kind == "memory":
        budget["context"] = _whole(fields, "context")
    asked: dict[str, Any] = {
        "model": model,
        "budget": budget,
        "effort": fields["effort"],
        "code": fields["code"],
        "allocation": {"method": fields["method"], "embeddings": fields["embeddings"]},
        "calibration": {"length": _whole(fields, "length")},
        "label": fields["label"] or None,
    }
    if fields["sequences"]:
        asked["calibration"]["sequences"] = _whole(fields, "sequences")
    return merged(asked, _more(fields["more"]))


def fields_of(spec: JobSpec) -> dict[str, str]:
    """Fields that ask for this specification, with what has no field as JSON in `more`."""
    stored = spec.model_dump(mode="json")
    model, budget = stored["model"], spec.budget
    fields = {
        **DEFAULTS,
        "source": model["source"],
        "name": model[SOURCES[model["source"]]],
        "revision": model.get("revision", "main"),
        "file": model["file"] or "",
        "kind": budget.kind,
        "value": f"{budget.value:.17g}" if isinstance(budget.value, float) else str(budget.value),
        "context": str(budget.context or DEFAULTS["context"]),
        "effort": spec.effort,
        "code": spec.code,
        "embeddings": spec.allocation.embeddings,
        "sequences": str(spec.calibration.sequences),
        "length": str(spec.calibration.length),
        "label": spec.label or "",
    }
    if spec.allocation.method in METHODS:
        fields["method"] = spec.allocation.method
    plain = parse_spec(specification(fields)).model_dump(mode="json")
    rest = _beyond(stored, plain)
    fields["more"] = json.dumps(rest, indent=1) if rest else ""
    return fields


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the members of `above`, within objects too."""
    found = dict(below)
    for key, value in above.items():
        inner = found.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        found[key] = merged(inner, value) if both else value  # type: ignore[arg-type]
    return found


def _beyond(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What must be merged into `given` to make it `wanted`."""
    found: dict[str, Any] = {}
    for key, value in wanted.items():
        inner = given.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            if rest := _beyond(value, inner):
                found[key] = rest
        elif value != inner:
            found[key] = value
    return found


def _submit(context: Context, caller: Principal, fields: Mapping[str, str], once: str) -> str:
    spec = parse_spec(specification(fields))
    priority = _whole(fields, "priority")
    if not -100 <= priority <= 100:
        raise InputError(f"priority {priority} is not within -100 to 100", param="priority")
    key = None
    if _ONCE.fullmatch(once):
        asked = {"spec": spec.model_dump(mode="json"), "priority": priority}
        key = f"form-{once}-{sha256_json(asked)[:32]}"
    answer = api.create_job(spec, context, caller, idempotency_key=key, priority=priority)
    return answer.headers["location"]


def _fields(form: Form) -> dict[str, str]:
    return {name: text(form, name) if name in form else DEFAULTS[name] for name in DEFAULTS}


def _amount(fields: Mapping[str, str]) -> float | int:
    if fields["kind"] in ("size", "memory"):
        return parse_size(fields["value"], param="value")
    try:
        return float(fields["value"])
    except ValueError as error:
        raise InputError(f"{fields['value'][:80]!r} is no number", param="value") from error


def _whole(fields: Mapping[str, str], name: str) -> int:
    try:
        return int(fields[name])
    except ValueError as error:
        raise InputError(f"{name} {fields[name][:80]!r} is no whole number", param=name) from error


def _more(written: str) -> dict[str, Any]:
    if not written:
        return {}
    try:
        found = bounded_json.loads(written.encode())
    except ValueError as error:
        raise InputError(f"the further settings are not JSON: {error}", param="more") from error
    if not isinstance(found, dict):
        raise InputError("the further settings are no JSON object", param="more")
    return found


def _status(error: BitmillError | ProblemError) -> int:
    return error.status if isinstance(error, ProblemError) else status_and_hint(error)[0]


def _form(
    request: Request,
    fields: Mapping[str, str],
    *,
    error: BitmillError | ProblemError | None = None,
    spec: JobSpec | None = None,
    plan: PlanView | None = None,
    status: int = 200,
) -> Response:
    problem = None
    if isinstance(error, ProblemError):
        problem = {"detail": error.detail, "hint": error.hint, "param": error.param}
    elif error is not None:
        hint = advice(status_and_hint(error)[1])
        problem = {"detail": error.message, "hint": hint, "param": error.param}
    return render(
        request,
        "new_job.html",
        status=status,
        fields=fields,
        sources=tuple(SOURCES),
        kinds=KIND_WORDS,
        efforts=get_args(Effort),
        codes=get_args(CodeName),
        methods=METHODS,
        embeddings=get_args(JobAllocation.model_fields["embeddings"].annotation),
        once=secrets.token_hex(16),
        problem=problem,
        asked=None if plan is None else specification(fields),
        plan=plan,
        cost=None if spec is None or plan is None else _cost(spec, plan),
    )


def _cost(spec: JobSpec, plan: PlanView) -> dict[str, float] | None:
    """What the target costs, on the line between the smallest and the largest size.

    Exact at both ends; between them scales and orders make it bend a little. None for targets of
    memory and of loss, whose size only the job finds.
    """
    kind, low, high = spec.budget.kind, plan.smallest, plan.largest
    if kind not in ("bits", "code_bits", "size"):
        return None
    ends = float(getattr(low, kind)), float(getattr(high, kind))
    share = (spec.budget.value - ends[0]) / (ends[1] - ends[0]) if ends[1] > ends[0] else 1.0
    share = min(1.0, max(0.0, share))
    return {
        name: getattr(low, name) + share * (getattr(high, name) - getattr(low, name))
        for name in ("bits", "code_bits", "size")
    } | {"share": share}
