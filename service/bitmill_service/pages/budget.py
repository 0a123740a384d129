"""What a budget buys on a stored profile, and a job that spends it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import Field

from bitmill.config.closed import Closed
from bitmill.config.quantization import Budget, parse_part
from bitmill_service.api.context import Context, ContextDep, PrincipalDep
from bitmill_service.api.routes import jobs as api
from bitmill_service.api.routes import profiles
from bitmill_service.http.access import PAGES, Principal
from bitmill_service.http.problems import ProblemError
from bitmill_service.pages.forms import Form
from bitmill_service.pages.rendering import render
from bitmill_service.schemas import AllocationRequest, JobView
from bitmill_workers.job_spec import parse_spec

Kind = Literal["size", "max_loss_increase", "memory", "bits"]
KINDS = {"size": "size", "max_loss_increase": "quality", "memory": "memory", "bits": "bits"}
UNITS = {"size": "MB", "max_loss_increase": "nats a token", "memory": "MB", "bits": "bits a weight"}
_MEGA = 1_000_000
_KEPT = ("order", "embeddings", "keep", "kept_dtype", "check")
"""Members of a job's allocation that go on; what the slider shows has no other constraints."""

router = APIRouter()


@dataclass(frozen=True)
class Trust:
    """Measured KL over predicted loss: from `low` to `high`, and where that is known from."""

    low: float
    high: float
    ground: str

    @classmethod
    def of(cls, jobs: Iterable[JobView]) -> Trust:
        """From the jobs of a profile where they measured enough, else from the record."""
        found = [ratio for job in jobs for ratio in _ratios(job.result or {})]
        if len(found) < _ENOUGH:
            return RECORDED
        ground = f"jobs of this profile measured {min(found):.2f} to {max(found):.2f} times theirs."
        return cls(min(found), max(found), ground)


_ENOUGH = 4
"""Measured texts of jobs below which the record is the better guide."""
RECORDED = Trust(  # benchmarks/results/jobs.md, the Wikipedia text
    0.57,
    1.42,
    "27 recorded jobs on two models measured 0.57 to 1.42 times the profile's prediction.",
)


class Asked(Closed):
    """A budget as the page's form has it: sizes in MB; context and batch count for `memory`."""

    kind: Kind = "size"
    value: float | None = Field(default=None, gt=0, lt=1e12)
    context: int = Field(default=4096, ge=1, le=1 << 27)
    batch: int = Field(default=1, ge=1, le=65536)

    @property
    def budget(self) -> Budget:
        """Raises `SpecError` for what no budget can be."""
        value = self.value
        if value is not None and self.kind in ("size", "memory"):
            value = int(_MEGA * value)
        fields: dict[str, Any] = {self.kind: value}
        if self.kind == "memory":
            fields |= {"context": self.context, "batch": self.batch}
        return parse_part(Budget, fields)


@router.get("/profiles/{profile_id}")
def show_profile(
    request: Request,
    profile_id: profiles.ProfileId,
    context: ContextDep,
    caller: PrincipalDep,
    asked: Annotated[Asked, Query()],
) -> Response:
    """The slider of a profile; without scripts, one budget at a time."""
    found = None
    if asked.value is not None:
        wanted = AllocationRequest(budget=asked.budget, curve=(1.0,))
        found = profiles.allocate_budget(profile_id, wanted, context, caller)
    jobs = _jobs(context, caller, profile_id)
    return render(
        request,
        "budget.html",
        profile=profiles.get_profile(profile_id, context, caller),
        kinds=KINDS,
        units=UNITS,
        asked=asked,
        found=found,
        trust=Trust.of(jobs),
        model_job=jobs[0] if jobs else None,
    )


@router.post("/profiles/{profile_id}/jobs")
def submit(
    profile_id: profiles.ProfileId, context: ContextDep, caller: PrincipalDep, form: Form
) -> Response:
    """Submit the profile's newest job again with the form's budget, and show the new one."""
    jobs = _jobs(context, caller, profile_id)
    if not jobs:
        raise ProblemError("job_not_found", f"no job of profile {profile_id[:64]} is left")
    spec = jobs[0].spec
    kept = {name: spec["allocation"][name] for name in _KEPT if name in spec["allocation"]}
    changes = {
        "budget": parse_part(Asked, dict(form)).budget.model_dump(mode="json", exclude_none=True),
        "allocation": {"method": "knapsack"} | kept,
    }
    answer = api.create_job(parse_spec({**spec, **changes}), context, caller)
    return RedirectResponse(PAGES + answer.headers["location"].removeprefix("/v1"), 303)


def _jobs(context: Context, caller: Principal, profile_id: str) -> list[JobView]:
    page = api.list_jobs(context, caller, profile=profile_id, limit=200)
    return [job for job in page.jobs if job.spec.get("allocation", {}).get("method") == "knapsack"]


def _ratios(result: Mapping[str, Any]) -> list[float]:
    """Measured KL over predicted loss of a job's own row, one per text."""
    rows = result.get("rows", [])[1:2]
    return [
        found["kl"] / row["predicted_loss"]
        for row in rows
        if row.get("predicted_loss")
        for found in row["texts"].values()
    ]
