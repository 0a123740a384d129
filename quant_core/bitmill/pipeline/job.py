"""A job from fetched files to a published checkpoint: one function per stage, in order.

    resolve -> plan -> profile -> allocate -> refine -> pack -> verify -> evaluate -> publish

Every stage writes one folder of the job directory and is skipped while the hash of its inputs is
the same (`workspace.py`); `profile` and `refine` also go on at the last finished decoder block. The
same settings on the same machine give the same bytes: seed, thread count, device kind, number of
devices and compute precision are part of the hashes. Nothing here needs a network.

With several devices every rank runs these functions: `profile`, `refine` and `evaluate` divide the
work, the other stages are the first rank's while the others wait (`runtime/ranks.py`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bitmill.allocation.allocator import Allocator, allocate, check_budget
from bitmill.allocation.profile import PROFILE_NAME, SensitivityProfile, profile_key
from bitmill.calibration.windows import CalibrationSet, calibration_tokens
from bitmill.config.bit_width_map import MAP_NAME, WIDTHS, BitWidthMap
from bitmill.config.quantization import Budget, QuantizationConfig
from bitmill.errors import SpecError, raise_resource_error
from bitmill.evaluation.compare import Candidate, from_packed, measure, measure_tasks, with_weights
from bitmill.evaluation.logits import StreamedLogits
from bitmill.evaluation.tasks import TaskSuite
from bitmill.formats.accounting import checkpoint_tensors, footprint, order_owners
from bitmill.formats.packed.checkpoint import write_checkpoint
from bitmill.io import atomic as storage
from bitmill.io.manifest import Manifest, read_manifest, write_manifest
from bitmill.models.convert_gguf import CONVERSION_VERSION, convert_gguf
from bitmill.models.dtypes import compute_dtype
from bitmill.models.reader import CheckpointSource, check_all_finite
from bitmill.models.skeleton import check_skeleton
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.learned_parameters import RECORD_NAME, LearnedFor, LearnedParameters
from bitmill.pipeline.progress import Progress
from bitmill.pipeline.requirements import Room, check_room
from bitmill.pipeline.resume import take_over
from bitmill.pipeline.verify import verify_folder
from bitmill.pipeline.workspace import Workspace
from bitmill.plan.config_json import read_config, refuse_pickles
from bitmill.plan.model_plan import Plan, check_lengths, check_rows, make_plan
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.reporting.learning import overfitting_warnings
from bitmill.reporting.summary import SUMMARY_NAME, summarize
from bitmill.results import QualityReport
from bitmill.runtime.child import run_child
from bitmill.runtime.process import settle_process
from bitmill.runtime.ranks import SINGLE, Group
from bitmill.runtime.warm_up import warm_up
from bitmill.sensitivity.measure import ProfileRequest, make_profile
from bitmill.transforms.column_order import FoldedOrders

PLAN_NAME = "plan.json"
FILES_NAME = "files.json"
QUALITY_NAME = "quality.json"
HASHES_NAME = "tensor_hashes.json"


@dataclass(frozen=True)
class Job:
    """What a run is given. profiles: folder of profiles by id, shared between jobs, or None.

    task_folder: harness task files beside the harness's own, or None.
    """

    config: QuantizationConfig
    model_folder: Path
    space: Workspace
    output: Path
    gguf: str | None
    profiles: Path | None
    device: torch.device
    group: Group = SINGLE
    task_folder: Path | None = None

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What else than data decides the bytes of a result."""
        return {
            "seed": self.config.seed,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "devices": self.group.size,
            "torch": torch.__version__,
        }


@dataclass(frozen=True)
class Source:
    """Where the source model lies after `resolve`, and the hash of its files."""

    folder: Path
    digest: str


@dataclass(frozen=True)
class Result:
    """What a finished job made."""

    output: Path
    manifest: Manifest
    quality: QualityReport
    profile_id: str | None


def run_job(
    config: QuantizationConfig,
    model_folder: Path,
    job_dir: Path,
    output_dir: Path,
    *,
    gguf: str | None = None,
    profile_folder: Path | None = None,
    task_folder: Path | None = None,
    device: str | torch.device = "cpu",
    group: Group = SINGLE,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Run all stages; a run that was killed goes on where it was.

    model_folder: local files of the source; gguf: name of the GGUF file in it.
    task_folder: task files for `evaluation.tasks`; they may run code, so trust their author.
    group: the ranks that call this with the same arguments, `devices` of them
    (`runtime/launch.py`). Raises a `BitmillError`; nothing of `output_dir` exists until the last
    stage ends.
    """
    if group.size != config.devices:
        raise SpecError(
            f"devices is {config.devices}, the job was started on {group.size}: start it by "
            "`bitmill quantize --devices` or a worker, or give the number it runs on",
            param="devices",
        )
    if config.threads:
        torch.set_num_threads(max(1, config.threads // group.size))
    settle_process()
    job = Job(
        config=config,
        model_folder=model_folder,
        space=Workspace(job_dir, on_progress, should_stop, group),
        output=output_dir,
        gguf=gguf,
        profiles=profile_folder,
        device=torch.device(device),
        group=group,
        task_folder=task_folder,
    )
    try:
        return _run_stages(job)
    except Exception as error:
        raise_resource_error(error)
        raise


def _run_stages(job: Job) -> Result:
    check_machine(job)
    source = resolve(job)
    planned = plan(job, source)
    tokens = calibration_tokens(job.config.calibration, source.folder, seed=job.config.seed)
    learned_for = LearnedFor.of_job(job.config, model=source.digest, calibration=tokens.digest)
    learned = _learned_earlier(job.config, learned_for)
    profiled = profile(job, source, planned, tokens)
    bit_widths = allocate_widths(job, planned, profiled)
    if learned is None:
        refined = refine(job, source, planned, tokens, profiled, bit_widths)
    else:
        refined = resume(job, planned, bit_widths, learned)
    packed = pack(job, source, planned, bit_widths, refined)
    verify(job, planned, packed, refined)
    quality = evaluate(job, source, planned, tokens, profiled, bit_widths, packed, refined)
    manifest = publish(job, packed, quality, learned_for)
    return Result(job.output, manifest, quality, profiled.key if profiled else None)


def check_machine(job: Job) -> None:
    """Raise `ResourceError` for a job that this machine cannot hold, before it does anything."""
    planned = make_plan(job.model_folder, job.config, gguf=job.gguf)
    rooms = job.group.gather(Room.here(job.device, job.space.root, job.output))
    check_room(planned, job.config, Room.of_ranks(rooms), gguf=job.gguf is not None)


def _learned_earlier(config: QuantizationConfig, asked: LearnedFor) -> LearnedParameters | None:
    """The learned parameters that the job takes over, after all checks but that of the map."""
    given = config.refinement.omniquant.resume_parameters
    if given is None:
        return None
    learned = LearnedParameters.open(given)
    learned.learned_for.check(asked)
    return learned


def _source_files(job: Job) -> list[Path]:
    if job.gguf is not None:
        return [job.model_folder / job.gguf]
    return sorted(path for path in job.model_folder.iterdir() if path.is_file())


def resolve(job: Job) -> Source:
    """Files of the source with their SHA-256; a GGUF file becomes a folder of safetensors."""
    files = _source_files(job)
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]

    def work(folder: Path) -> None:
        if job.gguf is None:
            refuse_pickles(job.model_folder)
        else:
            convert_gguf(job.model_folder / job.gguf, folder / "source")
        hashes = {}
        for i, path in enumerate(files, 1):
            hashes[path.name] = {
                "size": path.stat().st_size,
                "sha256": storage.sha256_file(path),
            }
            job.space.unit("resolve", i, len(files), "file", path.name)
        storage.write_json(folder / FILES_NAME, hashes)

    inputs: dict[str, Any] = {"gguf": job.gguf, "files": stats}
    conversion = {} if job.gguf is None else {"conversion": CONVERSION_VERSION}
    folder = job.space.run("resolve", inputs | conversion, work)
    digest = storage.sha256_json(storage.read_json(folder / FILES_NAME) | conversion)
    return Source(job.model_folder if job.gguf is None else folder / "source", digest)


def plan(job: Job, source: Source) -> Plan:
    """Linears, kept tensors and sizes; refuses impossible budgets, windows, tasks, NaN weights, and
    configurations of which transformers builds another model than is planned."""
    warm_up(job.device)  # beside reading all weights
    allocation = job.config.allocation.model_dump(mode="json")

    def work(folder: Path) -> None:
        made = make_plan(source.folder, job.config)
        check_budget(made, job.config)
        check_lengths(made, job.config)
        check_rows(made, job.config)
        check_skeleton(read_config(source.folder)[0])
        _task_suite(job)
        with CheckpointSource(source.folder) as tensors:
            check_all_finite(tensors, made.stored)
        for note in made.notes:
            job.space.warn("plan", note)
        storage.write_bytes(folder / PLAN_NAME, made.model_dump_json(indent=1).encode())

    inputs = {
        "model": source.digest,
        "allocation": allocation,
        "budget": job.config.budget.model_dump(mode="json"),
        "map": _given_map(job),
        "tasks": job.config.evaluation.tasks,
        "devices": job.config.devices,
    }
    folder = job.space.run("plan", inputs, work)
    return Plan.model_validate_json((folder / PLAN_NAME).read_bytes())


def _given_map(job: Job) -> str | None:
    given = job.config.allocation.map
    return given.to_json() if given else None


def _task_suite(job: Job) -> TaskSuite | None:
    tasks = job.config.evaluation.tasks
    return TaskSuite(tasks, job.task_folder) if tasks else None


def _profile_settings(job: Job, planned: Plan) -> dict[str, Any] | None:
    """What the profile must hold, or None where the job needs none."""
    allocation = job.config.allocation
    resumed = job.config.refinement.omniquant.resume_parameters is not None
    if allocation.method in ("uniform", "map") and (allocation.order == "natural" or resumed):
        return None
    settings: dict[str, Any] = {
        "kind": "orders",
        "order": allocation.order,
        "keep": list(allocation.keep),
        "dtype": str(compute_dtype(job.device, planned)),
        **job.fingerprint,
    }
    if job.config.calibration.profile_sequences is not None:
        settings["sequences"] = job.config.calibration.profile_sequences
    if planned.embeddings:
        settings["embeddings"] = [matrix.name for matrix in planned.embeddings]
    if allocation.method == "knapsack":
        settings |= {"kind": "knapsack", "widths": list(WIDTHS)}
    if allocation.method == "sba":
        base = Allocator(planned, allocation).sba_base(job.config.budget)
        settings |= {"kind": "sba", "base": base}
    return settings


def profile(
    job: Job, source: Source, planned: Plan, tokens: CalibrationSet
) -> SensitivityProfile | None:
    """What every width costs every group, and the column orders; kept for later jobs by its key."""
    settings = _profile_settings(job, planned)
    if settings is None:
        return None
    key = profile_key(source.digest, tokens.digest, settings)

    def work(folder: Path) -> None:
        known = job.profiles / key / PROFILE_NAME if job.profiles else None
        if job.group.broadcast(known is not None and known.is_file()):
            if known is not None and job.group.first:
                shutil.copyfile(known, folder / PROFILE_NAME)
            return
        made = make_profile(
            _open_model(job, source, planned),
            tokens.tokens[: job.config.calibration.profiled],
            planned,
            ProfileRequest(settings, source.digest, tokens.digest),
            folder=folder,
            on_unit=partial(job.space.unit, "profile"),
            group=job.group,
        )
        if job.group.first:
            made.save(folder / PROFILE_NAME)

    folder = job.space.run("profile", {"key": key}, work, shared=True)
    if job.group.first and job.profiles is not None and not (job.profiles / key).exists():
        with storage.atomic_folder(job.profiles / key) as kept:
            shutil.copyfile(folder / PROFILE_NAME, kept / PROFILE_NAME)
            shutil.copyfile(job.space.root / "plan" / PLAN_NAME, kept / PLAN_NAME)
    return SensitivityProfile.load(folder / PROFILE_NAME)


def _open_model(job: Job, source: Source, planned: Plan) -> StreamedModel:
    dtype = compute_dtype(job.device, planned)
    return StreamedModel(source.folder, planned, device=job.device, dtype=dtype)


def allocate_widths(job: Job, planned: Plan, profiled: SensitivityProfile | None) -> BitWidthMap:
    """The bit-width map: stage `allocate`."""
    inputs = {
        "profile": profiled.digest if profiled else None,
        "plan": storage.sha256_file(job.space.root / "plan" / PLAN_NAME),
        "spec": job.config.model_dump(mode="json", include={"allocation", "budget"}),
        "map": _given_map(job),
    }

    def work(folder: Path) -> None:
        made = allocate(planned, job.config, profiled)
        storage.write_bytes(folder / MAP_NAME, made.to_json().encode())

    return BitWidthMap.load(job.space.run("allocate", inputs, work) / MAP_NAME)


def refine(
    job: Job,
    source: Source,
    planned: Plan,
    tokens: CalibrationSet,
    profiled: SensitivityProfile | None,
    bit_widths: BitWidthMap,
) -> RefinedModel:
    """Codes, scales and zeros of every linear, block by block."""
    inputs = {
        "model": source.digest,
        "calibration": tokens.digest,
        "map": bit_widths.to_json(),
        "orders": profiled.digest if profiled and bit_widths.order == "activation" else None,
        "refinement": job.config.refinement.model_dump(mode="json"),
        "dtype": str(compute_dtype(job.device, planned)),
        **job.fingerprint,
    }

    def work(folder: Path) -> None:
        refine_model(
            _open_model(job, source, planned),
            RefineInputs(tokens, bit_widths, _orders(profiled, bit_widths)),
            job.config.refinement,
            folder,
            seed=job.config.seed,
            on_unit=partial(job.space.unit, "refine"),
            group=job.group,
        )

    return RefinedModel(job.space.run("refine", inputs, work, shared=True), planned)


def resume(
    job: Job, planned: Plan, bit_widths: BitWidthMap, learned: LearnedParameters
) -> RefinedModel:
    """Stage `refine` of a job that takes over what an earlier one learned; trains nothing."""

    def work(folder: Path) -> None:
        learned.check_map(bit_widths)
        take_over(learned, planned, folder, partial(job.space.unit, "refine"))

    inputs = {"learned": learned.digest, "map": bit_widths.to_json()}
    return RefinedModel(job.space.run("refine", inputs, work), planned)


def _orders(
    profiled: SensitivityProfile | None, bit_widths: BitWidthMap
) -> dict[str, torch.Tensor]:
    """Full name of a linear -> i64 [K], packed column k is input column order[k]."""
    if profiled is None or bit_widths.order == "natural":
        return {}
    owned = {
        owner: torch.tensor(order, dtype=torch.int64) for owner, order in profiled.orders.items()
    }
    return {
        linear.name: owned[linear.order] for linear in profiled.linears if linear.order is not None
    }


def pack(
    job: Job, source: Source, planned: Plan, bit_widths: BitWidthMap, refined: RefinedModel
) -> Path:
    """The packed folder, without its quality report and manifest."""

    def work(folder: Path) -> None:
        owners = order_owners(planned, bit_widths.order)
        kept = {tensor.name: tensor for tensor in planned.tensors}
        done = 0

        def on_linear(_: str) -> None:
            nonlocal done
            done += 1
            job.space.unit("pack", done, len(planned.shapes), "linear")

        packed = folder / "packed"
        shutil.rmtree(packed, ignore_errors=True)
        packed.mkdir()
        with CheckpointSource(source.folder) as stored:
            hashes = write_checkpoint(
                packed,
                source=source.folder,
                tensors=checkpoint_tensors(planned, bit_widths.linears, bit_widths.order),
                bit_widths=bit_widths,
                linear=FoldedOrders(refined, planned).packed,
                other=lambda name: stored.tensor(kept[name]),
                orders={name: f"{owner}.order" for name, owner in owners.items()},
                on_linear=on_linear,
            )
        storage.write_json(folder / HASHES_NAME, hashes)

    inputs = {"refined": refined.digest, "folded": sorted(planned.feeders)}
    return job.space.run("pack", inputs, work) / "packed"


def verify(job: Job, planned: Plan, packed: Path, refined: RefinedModel) -> None:
    """Reload the packed folder in a fresh process and compare; raises `VerificationError`.

    A check that came to no judgement, because its process died, raises what `run_child` raises.
    """

    def work(folder: Path) -> None:
        order = {
            "folder": str(packed),
            "plan": str(job.space.root / "plan" / PLAN_NAME),
            "tensor_hashes": str(packed.parent / HASHES_NAME),
            "code_hashes": refined.code_hashes(),
            "refined": str(refined.folder),
            "budget": job.config.budget.model_dump(mode="json"),
            "report": str(folder / "verify.json"),
            "threads": torch.get_num_threads(),
        }
        storage.write_json(folder / "order.json", order)
        run_child(
            "the process that checks the packed folder",
            ["-m", "bitmill", "verify", str(folder / "order.json")],
        )

    job.space.run("verify", {"packed": refined.digest, "plan": planned.model_type}, work)


def verify_order(order: dict[str, Any]) -> None:
    """What the fresh process of `verify` does; `order` is the JSON that the stage wrote."""
    torch.set_num_threads(order["threads"])
    planned = Plan.model_validate_json(Path(order["plan"]).read_bytes())
    report = verify_folder(
        Path(order["folder"]),
        order["code_hashes"],
        Budget.model_validate(order["budget"]),
        planned,
        tensor_hashes=storage.read_json(Path(order["tensor_hashes"])),
        solved=FoldedOrders(RefinedModel(Path(order["refined"]), planned), planned).solved,
    )
    storage.write_json(Path(order["report"]), report.model_dump(mode="json"))


def evaluate(
    job: Job,
    source: Source,
    planned: Plan,
    tokens: CalibrationSet,
    profiled: SensitivityProfile | None,
    bit_widths: BitWidthMap,
    packed: Path,
    refined: RefinedModel,
) -> QualityReport:
    """Perplexity and KL of the packed folder against the source, and of the baselines asked for.

    Beside the report lies the summary of a profile that has costs of the job's widths.
    """
    asked = job.config.evaluation
    inputs = {
        "packed": refined.digest,
        "profile": profiled.digest if profiled else None,
        "allocation": job.config.allocation.model_dump(mode="json"),
        "evaluation": asked.model_dump(mode="json"),
        **job.fingerprint,
    }

    def work(folder: Path) -> None:
        model = _open_model(job, source, planned)
        candidates: dict[str, Candidate] = {
            _method_name(job.config): (bit_widths, from_packed(model, packed))
        }
        for width in _baseline_widths(planned, job.config, bit_widths):
            uniform = BitWidthMap.uniform(planned.shapes, width)
            baseline = _baseline(job, model, tokens, uniform, folder / f"baseline-{width}")
            candidates[f"uniform {width}-bit gptq"] = (uniform, _from_refined(model, baseline))
        rows = measure(
            model,
            source.folder,
            asked,
            candidates,
            partial(job.space.unit, "evaluate"),
            partial(_predicted, profiled),
            group=job.group,
        )
        if not job.group.first:
            return
        if suite := _task_suite(job):
            ours = _method_name(job.config)
            rows = measure_tasks(
                suite,
                rows,
                {"source": source.folder, ours: packed},
                packed=ours,
                device=job.device,
                dtype=model.dtype,
                seed=job.config.seed,
                on_unit=partial(job.space.unit, "evaluate"),
            )
        linears, blocks = refined.reports()
        overfitting = overfitting_warnings(blocks, refined.tuning())
        for warning in overfitting:
            job.space.warn("evaluate", warning)
        report = QualityReport(
            rows=tuple(rows),
            predicted_loss=_predicted(profiled, bit_widths),
            linears=linears,
            blocks=blocks,
            tuning=refined.tuning(),
            resumed=job.config.refinement.omniquant.resume_parameters is not None,
            warnings=(*planned.notes, *overfitting),
            seconds=job.space.seconds(),
        )
        storage.write_bytes(folder / QUALITY_NAME, report.to_json().encode())
        _write_summary(folder, planned, job.config, profiled, bit_widths)
        for baseline_folder in folder.glob("baseline-*"):
            shutil.rmtree(baseline_folder)

    folder = job.space.run("evaluate", inputs, work, shared=True)
    return QualityReport.load(folder / QUALITY_NAME)


def _method_name(config: QuantizationConfig) -> str:
    return f"{config.allocation.method} {config.refinement.method}"


def _predicted(profiled: SensitivityProfile | None, bit_widths: BitWidthMap) -> float | None:
    if profiled is None or not profiled.widths:
        return None
    used = {width for widths in bit_widths.linears.values() for width in widths}
    if not used <= set(profiled.widths):
        return None
    return profiled.predicted_loss(bit_widths.linears)


def _write_summary(
    folder: Path,
    planned: Plan,
    config: QuantizationConfig,
    profiled: SensitivityProfile | None,
    bit_widths: BitWidthMap,
) -> None:
    summary = summarize(planned, config.allocation, profiled, bit_widths) if profiled else None
    if summary is not None:
        storage.write_bytes(folder / SUMMARY_NAME, summary.to_json().encode())


def _baseline_widths(
    planned: Plan, config: QuantizationConfig, bit_widths: BitWidthMap
) -> list[int]:
    """Widths of the baselines asked for, each once, ascending."""
    mean = footprint(planned, bit_widths).code_bits
    nearest = min(config.allocation.legal_widths, key=lambda b: (abs(b - mean), b))
    asked = config.evaluation.baselines
    return sorted({nearest if name == "uniform" else int(name[-1]) for name in asked})


def _baseline(
    job: Job, model: StreamedModel, tokens: CalibrationSet, uniform: BitWidthMap, folder: Path
) -> RefinedModel:
    """Plain GPTQ with clip search in natural order."""
    plain = job.config.refinement.model_copy(
        update={
            "method": "gptq",
            "compensated_grid": False,
            "scale_refit": False,
            "asymmetric": False,
        }
    )
    folder.mkdir(exist_ok=True)  # any rank may come first
    refine_model(
        model,
        RefineInputs(tokens, uniform, {}),
        plain,
        folder,
        seed=job.config.seed,
        on_unit=partial(_report_baseline, job.space),
        group=job.group,
    )
    return RefinedModel(folder, model.plan)


def _report_baseline(space: Workspace, done: int, total: int, unit: str, _: str) -> None:
    space.unit("evaluate", done, total, unit, "baseline")


def _from_refined(model: StreamedModel, refined: RefinedModel) -> StreamedLogits:
    return with_weights(model, lambda name: refined.linear(name).dequantize())


def publish(job: Job, packed: Path, quality: QualityReport, learned_for: LearnedFor) -> Manifest:
    """Put the packed folder with its report and manifest in place; it appears whole.

    learned_for: goes with the folder where its parameters were learned.
    """
    learned = learned_for.model_dump(mode="json") if quality.blocks else None

    def work(_: Path) -> None:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        with storage.atomic_folder(job.output) as folder:
            for path in sorted(packed.rglob("*")):
                target = folder / path.relative_to(packed)
                target.mkdir() if path.is_dir() else _link_or_copy(path, target)
            storage.write_bytes(folder / QUALITY_NAME, quality.to_json().encode())
            if summary.is_file():
                shutil.copyfile(summary, folder / SUMMARY_NAME)
            if learned is not None:
                storage.write_json(folder / RECORD_NAME, learned)
            write_manifest(folder)

    summary = job.space.root / "evaluate" / SUMMARY_NAME
    inputs = {
        "quality": quality.to_json(),
        "output": str(job.output),
        "packed": storage.sha256_file(packed.parent / HASHES_NAME),
        "summary": storage.sha256_file(summary) if summary.is_file() else None,
        "learned": learned,
    }
    if job.group.broadcast(not job.output.exists()):
        job.space.forget("publish")
    job.space.run("publish", inputs, work)
    return read_manifest(job.output)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
