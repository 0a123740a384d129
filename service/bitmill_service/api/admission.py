"""What is refused before a job exists: bad references, impossible budgets, unsafe files.

Everything that config and headers alone can tell is told here, within seconds and without a
runner. A Hub that does not answer is no ground for refusal; the worker will try again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bitmill.allocation.allocator import check_budget
from bitmill.config.bit_width_map import BitWidthMap, group_columns
from bitmill.config.quantization import FileText, QuantizationConfig
from bitmill.errors import CalibrationError
from bitmill.formats.accounting import footprint
from bitmill.pipeline.estimate import Machine, estimate
from bitmill.plan.model_plan import Plan, make_plan
from bitmill_service.api.context import Context
from bitmill_service.api.hub_headers import fetch_headers
from bitmill_service.http.problems import ProblemError
from bitmill_service.schemas import PlanView, SizeView
from bitmill_workers.execution.fetch import check_model, local_model
from bitmill_workers.execution.inputs import (
    calibration_file,
    check_parameters,
    given_map,
    planning_config,
)
from bitmill_workers.job_spec import HubModel, JobSpec
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
    config = _config(context, spec)
    if isinstance(spec.model, HubModel):
        check_model(spec.model, context.settings)
    else:
        check_budget(_plan(context, spec, config), config)


def plan_job(context: Context, spec: JobSpec) -> PlanView:
    """The plan of a specification, after everything that `admit` checks."""
    config = _config(context, spec)
    if isinstance(spec.model, HubModel):
        check_model(spec.model, context.settings)
    plan = _plan(context, spec, config)
    check_budget(plan, config)
    return plan_view(plan, config, gguf=spec.model.file is not None)


def route(context: Context, spec: JobSpec) -> str:
    """The queue that the job waits in; plans the job where queues are tiers of memory."""
    if not context.settings.route_by_memory:
        return choose_queue(0, context.settings)
    config = _config(context, spec)
    plan = _plan(context, spec, config)
    needed = estimate(plan, config, Machine(accelerator=True), gguf=spec.model.file is not None)
    return choose_queue(needed.accelerator_bytes, context.settings)


def plan_view(plan: Plan, config: QuantizationConfig, *, gguf: bool) -> PlanView:
    """Counts, the range of sizes that the legal widths allow, and what a runner needs."""
    widths = config.allocation.legal_widths
    return PlanView(
        model_type=plan.model_type,
        blocks=plan.block_count,
        linears=len(plan.linears),
        groups=sum(shape.groups for shape in plan.shapes),
        weights=plan.weights,
        fused=[plan.input_groups(block) for block in range(min(1, plan.block_count))],
        smallest=_uniform_size(plan, config, min(widths)),
        largest=_uniform_size(plan, config, max(widths)),
        estimate=estimate(plan, config, gguf=gguf),
        notes=plan.notes,
        on_accelerator=estimate(plan, config, Machine(accelerator=True), gguf=gguf),
    )


def _plan(context: Context, spec: JobSpec, config: QuantizationConfig) -> Plan:
    """The plan, from headers that are here or fetched from the Hub."""
    if isinstance(spec.model, HubModel):
        with tempfile.TemporaryDirectory(prefix="bitmill-plan-") as scratch:
            fetch_headers(spec.model, context.settings, Path(scratch))
            return make_plan(Path(scratch), config)
    folder = local_model(spec.model, context.settings)
    return make_plan(folder, config, gguf=spec.model.file)


def _uniform_size(plan: Plan, config: QuantizationConfig, width: int) -> SizeView:
    linears = {s.name: (width,) * len(group_columns(s.columns)) for s in plan.shapes}
    cost = footprint(plan, BitWidthMap(order=config.allocation.order, linears=linears))
    return SizeView(width=width, code_bits=cost.code_bits, bits=cost.bits, size=cost.size)


def _config(context: Context, spec: JobSpec) -> QuantizationConfig:
    """What the job is planned by, after a look at everything that the specification refers to."""
    _check_calibration(context, spec)
    given = given_map(spec, context.jobs, context.catalog, context.artifacts)
    config = planning_config(spec, given)
    check_parameters(spec, config, context.settings, context.jobs, context.artifacts)
    return config


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
