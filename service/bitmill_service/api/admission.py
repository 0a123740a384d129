"""What is refused before a job exists: bad references, impossible budgets, unsafe files.

Everything that config and headers alone can tell is told here, within seconds and without a
runner. A Hub that does not answer is no ground for refusal; the worker will try again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bitmill.allocation.allocator import check_budget
from bitmill.config.bit_width_map import BitWidthMap, group_columns
from bitmill.config.spec import FileText, HubModel, JobSpec
from bitmill.errors import CalibrationError
from bitmill.formats.accounting import footprint
from bitmill.pipeline.estimate import Machine, estimate
from bitmill.plan.model_plan import Plan, make_plan
from bitmill_service.api.context import Context
from bitmill_service.api.hub_headers import fetch_headers
from bitmill_service.http.problems import ProblemError
from bitmill_service.schemas import PlanView, SizeView
from bitmill_workers.execution.fetch import check_model, local_model
from bitmill_workers.execution.inputs import calibration_file, check_parameters, given_map
from bitmill_workers.tiers import choose_queue


def admit(context: Context, spec: JobSpec) -> None:
    """Raise what is wrong with a specification, as far as it can be known before it runs."""
    waiting = context.jobs.counts().get("queued", 0)
    if waiting >= context.settings.max_queued:
        raise ProblemError(
            "too_many_jobs",
            f"{waiting} jobs are waiting, at most {context.settings.max_queued} may",
            headers={"Retry-After": "60"},
        )
    given = _given(context, spec)
    if isinstance(spec.model, HubModel):
        check_model(spec.model, context.settings)
    else:
        check_budget(_plan(context, spec), spec, given)


def plan_job(context: Context, spec: JobSpec) -> PlanView:
    """The plan of a specification, after everything that `admit` checks."""
    given = _given(context, spec)
    if isinstance(spec.model, HubModel):
        check_model(spec.model, context.settings)
    plan = _plan(context, spec)
    check_budget(plan, spec, given)
    return plan_view(plan, spec)


def route(context: Context, spec: JobSpec) -> str:
    """The queue that the job waits in; plans the job where queues are tiers of memory."""
    if not context.settings.route_by_memory:
        return choose_queue(0, context.settings)
    plan = _plan(context, spec)
    needed = estimate(plan, spec, Machine(accelerator=True), gguf=spec.model.file is not None)
    return choose_queue(needed.accelerator_bytes, context.settings)


def plan_view(plan: Plan, spec: JobSpec) -> PlanView:
    """Counts, the range of sizes that the legal widths allow, and what a runner needs."""
    widths = spec.allocation.legal_widths
    gguf = spec.model.file is not None
    return PlanView(
        model_type=plan.model_type,
        blocks=plan.block_count,
        linears=len(plan.linears),
        groups=sum(shape.groups for shape in plan.shapes),
        weights=plan.weights,
        fused=[plan.input_groups(block) for block in range(min(1, plan.block_count))],
        smallest=_uniform_size(plan, spec, min(widths)),
        largest=_uniform_size(plan, spec, max(widths)),
        estimate=estimate(plan, spec, gguf=gguf),
        on_accelerator=estimate(plan, spec, Machine(accelerator=True), gguf=gguf),
    )


def _plan(context: Context, spec: JobSpec) -> Plan:
    """The plan, from headers that are here or fetched from the Hub."""
    if isinstance(spec.model, HubModel):
        with tempfile.TemporaryDirectory(prefix="bitmill-plan-") as scratch:
            fetch_headers(spec.model, context.settings, Path(scratch))
            return make_plan(Path(scratch), spec)
    folder = local_model(spec.model, context.settings)
    return make_plan(folder, spec, gguf=spec.model.file)


def _uniform_size(plan: Plan, spec: JobSpec, width: int) -> SizeView:
    linears = {s.name: (width,) * len(group_columns(s.columns)) for s in plan.shapes}
    cost = footprint(plan, BitWidthMap(order=spec.allocation.order, linears=linears))
    return SizeView(width=width, code_bits=cost.code_bits, bits=cost.bits, size=cost.size)


def _given(context: Context, spec: JobSpec) -> BitWidthMap | None:
    """The map that the specification names, after a look at its other references."""
    _check_calibration(context, spec)
    check_parameters(spec, context.settings, context.jobs, context.artifacts)
    return given_map(spec, context.jobs, context.catalog, context.artifacts)


def _check_calibration(context: Context, spec: JobSpec) -> None:
    """A file must lie below an allowed root and hold at least a byte for every token."""
    text = spec.calibration.text
    if not isinstance(text, FileText):
        return
    size = calibration_file(text, context.settings).stat().st_size
    if size < spec.calibration.length:
        raise CalibrationError(
            f"calibration text {text.path!r} has {size} bytes, which cannot hold one sequence of "
            f"{spec.calibration.length} tokens: give a longer text or a smaller length",
            code="text_too_short",
            param="calibration.text",
        )
