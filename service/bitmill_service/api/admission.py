"""What is refused before a job exists: bad references, impossible budgets, unsafe files.

Everything that config and headers alone can tell is told here, within seconds and without a
runner, and the same whether a job is submitted, rehearsed or tried again. A Hub that does not
answer is no ground for refusal; the worker will try again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bitmill.config.quantization import FileText, QuantizationConfig
from bitmill.errors import CalibrationError, InputError, ModelError
from bitmill.formats.accounting import footprint, uniform_map
from bitmill.formats.export_plan import ExportTarget
from bitmill.io.atomic import sha256_json
from bitmill.pipeline import admission as library
from bitmill.pipeline.estimate import Estimate, Machine
from bitmill.pipeline.learned_parameters import PARAM
from bitmill.plan.model_plan import Plan
from bitmill_service.api.context import Context
from bitmill_service.api.hub_headers import fetch_headers
from bitmill_service.api.skeleton_check import ask_transformers
from bitmill_service.http.access import Principal
from bitmill_service.http.problems import ProblemError
from bitmill_service.schemas import EmbeddingsView, ExportSizeView, PlanView, SizeView
from bitmill_workers.errors import UploadNotFound
from bitmill_workers.execution.fetch import local_model
from bitmill_workers.execution.inputs import (
    calibration_file,
    check_parameters,
    given_map,
    planning_config,
)
from bitmill_workers.job_spec import (
    HubModel,
    JobSpec,
    ModelRef,
    UploadModel,
    UploadParameters,
)
from bitmill_workers.storage.uploads import fetch_upload
from bitmill_workers.store.records import Quota
from bitmill_workers.tiers import choose_queue, largest_tier


@dataclass(frozen=True)
class Admission:
    """A job that may be queued.

    job: what the library admitted, with plan, map and needs; None where only the worker can tell,
    because the Hub did not deliver the headers. unplanned: why not. unchecked: why transformers was
    not heard about the model's config.json, which the worker asks again. exports: of its result.
    """

    queue: str
    job: library.Admission | None
    unplanned: str | None = None
    unchecked: str | None = None
    exports: Sequence[ExportTarget] = ()


def admit(context: Context, spec: JobSpec, caller: Principal) -> Admission:
    """Plan a job once and raise what is wrong with it, as far as can be known before it runs."""
    with looked_at(context, caller) as models:
        return admit_with(models, context, spec, caller)


@contextmanager
def looked_at(context: Context, caller: Principal) -> Iterator[Models]:
    """For `admit_with` of several jobs: each of their models is looked at once."""
    with ExitStack() as held:
        yield Models(context, caller, held)


def admit_with(models: Models, context: Context, spec: JobSpec, caller: Principal) -> Admission:
    """What `admit` says of a job, with models from `looked_at`."""
    config = _config(context, spec, caller)
    try:
        folder = models.folder(spec.model)
        admitted, needs = context.plans.admit(folder, config, spec.model.file)
    except ModelError as error:
        if error.code != "hub_unreachable":
            raise
        return Admission(_queue(context, None), None, error.message)
    library.check_exports(admitted, spec.exports)
    unchecked = models.unheard(admitted)
    queue = _queue(context, needs)
    return Admission(queue, admitted, unchecked=unchecked, exports=spec.exports)


def quota_of(context: Context, caller: Principal) -> Quota | None:
    """What the caller's tenant may have; nothing bounds who needs no key."""
    if caller.key_id is None:
        return None
    given, usual = caller.limits, context.settings
    return Quota(
        queued=usual.tenant_queued if given.queued is None else given.queued,
        running=usual.tenant_running if given.running is None else given.running,
        bytes=usual.tenant_bytes if given.bytes is None else given.bytes,
    )


def check_priority(caller: Principal, priority: int) -> None:
    """Raise `InputError` (code `priority_refused`) for a priority that the caller may not give."""
    low, high = caller.limits.priorities
    if not (low <= priority <= high or "admin" in caller.scopes):
        raise InputError(
            f"priority {priority} is not within {low} to {high}, which the key {caller.key_id} may "
            "give",
            code="priority_refused",
            param="priority",
        )


def refuse_when_full(context: Context, more: int = 1) -> None:
    """Raise the 429 where more jobs would wait than may."""
    waiting = context.jobs.waiting()
    if waiting + more > context.settings.max_queued:
        raise ProblemError(
            "too_many_jobs",
            f"{waiting} jobs are waiting, at most {context.settings.max_queued} may",
            headers={"Retry-After": "60"},
        )


def plan_view(admission: Admission) -> PlanView:
    """Counts, the range of sizes that the legal widths allow, and what a runner needs.

    Raises the 502 `hub_unreachable` where there is no plan to show.
    """
    job = admission.job
    if job is None:
        raise ProblemError("hub_unreachable", str(admission.unplanned), param="model.repo_id")
    plan, widths = job.plan, job.config.allocation.legal_widths
    return PlanView(
        model_type=plan.model_type,
        blocks=plan.block_count,
        linears=len(plan.linears),
        groups=sum(shape.groups for shape in plan.shapes),
        weights=plan.weights,
        fused=[plan.siblings(block) for block in range(min(1, plan.block_count))],
        smallest=_uniform_size(plan, job.config, min(widths)),
        largest=_uniform_size(plan, job.config, max(widths)),
        runtimes=library.readers(job),
        estimate=job.needs(),
        exports=[
            ExportSizeView(
                format=target.format,
                smallest=library.export_bytes(job, target, min(widths)),
                largest=library.export_bytes(job, target, max(widths)),
                runtimes=library.readers(job, target),
            )
            for target in admission.exports
        ],
        embeddings=_embeddings(job),
        notes=[*plan.notes, *([admission.unchecked] if admission.unchecked else [])],
        on_accelerator=job.needs(Machine(accelerator=True)),
    )


def _embeddings(job: library.Admission) -> EmbeddingsView | None:
    found = library.embedding_bytes(job, (8, 4))
    return None if found is None else EmbeddingsView(kept=found[0], packed=found[1])


class Models:
    """The models of one call: where their headers lie, which are here or fetched from the Hub into
    a folder that `held` removes, and what transformers says of them."""

    def __init__(self, context: Context, caller: Principal, held: ExitStack) -> None:
        self._context, self._caller, self._held = context, caller, held
        self._fetched: dict[HubModel, Path | ModelError] = {}
        self._heard: dict[str, str | None] = {}

    def unheard(self, admitted: library.Admission) -> str | None:
        """What `ask_transformers` says; where it was not heard, it is not asked again."""
        key = sha256_json(admitted.settings)
        if key not in self._heard:
            seconds = self._context.settings.skeleton_check_s
            self._heard[key] = ask_transformers(admitted.settings, seconds)
        return self._heard[key]

    def folder(self, model: ModelRef) -> Path:
        """Where a model's headers lie; raises `ModelError`."""
        if not isinstance(model, HubModel):
            return local_model(model, self._context.settings)
        if model not in self._fetched:
            self._fetched[model] = self._fetch(model)
        found = self._fetched[model]
        if isinstance(found, ModelError):
            raise found
        return found

    def _fetch(self, model: HubModel) -> Path | ModelError:
        settings = self._context.settings
        if not self._caller.may_use_hub_token(model.repo_id):
            settings = settings.model_copy(update={"hub_token": None})
        name = model.repo_id.rpartition("/")[2]  # errors name it
        scratch = self._held.enter_context(tempfile.TemporaryDirectory(prefix="bitmill-plan-"))
        folder = Path(scratch, name)
        folder.mkdir()
        try:
            fetch_headers(model, settings, folder)
        except ModelError as error:
            return error
        return folder


def _queue(context: Context, needed: Estimate | None) -> str:
    """Where the job waits; with unknown needs, for the largest accelerator that is at work."""
    if needed is not None:
        return choose_queue(needed.accelerator_bytes, context.settings)
    if not context.settings.route_by_memory:
        return choose_queue(0, context.settings)
    served = {queue for worker in context.catalog.workers() for queue in worker.queues}
    return largest_tier(served)


def _uniform_size(plan: Plan, config: QuantizationConfig, width: int) -> SizeView:
    allocation = config.allocation
    cost = footprint(plan, uniform_map(plan, width, allocation.legal_widths, allocation.order))
    return SizeView(width=width, code_bits=cost.code_bits, bits=cost.bits, size=cost.size)


def _config(context: Context, spec: JobSpec, caller: Principal) -> QuantizationConfig:
    """What the job is planned by, after a look at everything that the specification refers to."""
    _check_uploads(context, spec, caller)
    _check_calibration(context, spec)
    stores, sees = (context.jobs, context.artifacts), caller.sees
    given = given_map(spec, context.jobs, context.catalog, context.artifacts, tenant=sees)
    config = planning_config(spec, given)
    check_parameters(spec, config, context.settings, *stores, tenant=sees)
    return config


def _check_uploads(context: Context, spec: JobSpec, caller: Principal) -> None:
    """What was uploaded must be complete, the caller's, and is brought here to be looked at."""
    given = spec.refinement.resume_parameters
    named = [(spec.model, "model"), (given, PARAM)]
    for reference, member in named:
        if not isinstance(reference, UploadModel | UploadParameters):
            continue
        param = f"{member}.upload_id"
        try:
            context.uploads.get(reference.upload_id, tenant=caller.sees, complete=True)
        except UploadNotFound as error:
            raise InputError(error.message, code=error.code, param=param) from error
        fetch_upload(context.settings, context.artifacts, reference.upload_id)


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
