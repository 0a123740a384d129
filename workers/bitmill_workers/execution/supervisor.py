"""One attempt at a job: fetch, run the pipeline in a child, publish, and end the attempt.

The supervisor holds the lease. It renews it by the database, and where the database is away longer
than the lease it stops its child by its own clock. A refused write means that the job was given to
someone else: the child is killed and nothing more is written.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.config.made_for import MadeFor
from bitmill.errors import BitmillError, ProcessFailed, SpecError, as_bitmill_error
from bitmill.results import QUALITY_NAME
from bitmill.runtime.child import death
from bitmill_workers.errors import DeadlinePassed
from bitmill_workers.execution.eta import Eta
from bitmill_workers.execution.exits import Then, then
from bitmill_workers.execution.fetch import local_model
from bitmill_workers.execution.inputs import (
    fetch_files,
    fetch_parameters,
    given_map,
    local_config,
)
from bitmill_workers.execution.processes import Child, Ended
from bitmill_workers.execution.progress_relay import Reporter
from bitmill_workers.execution.pushing import TOKEN as PUSH_TOKEN
from bitmill_workers.execution.stage_turns import SupervisorTurns
from bitmill_workers.execution.stop import StopRequest
from bitmill_workers.job_spec import (
    AnySpec,
    ExportSpec,
    HubModel,
    JobSpec,
    ModelRef,
    PushSpec,
    UploadModel,
    parse_stored,
)
from bitmill_workers.logs import log_fields
from bitmill_workers.settings import SECRET_SETTINGS, Settings
from bitmill_workers.storage.artifacts import PROFILES, ArtifactStore
from bitmill_workers.storage.open import open_artifacts
from bitmill_workers.storage.uploads import fetch_upload
from bitmill_workers.store.catalog import Catalog
from bitmill_workers.store.db import DATABASE_ERRORS, Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.keys import KeyStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.limits import may_use_hub_token
from bitmill_workers.store.records import Artifact, JobRecord
from bitmill_workers.store.stats import stage_seconds
from bitmill_workers.store.sweeps import SweepStore
from bitmill_workers.store.tokens import open_token
from bitmill_workers.tiers import next_tier

_log = logging.getLogger(__name__)
T = TypeVar("T")

_RUNNER_SEES = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV"),
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_HOME"),
    *("PYTORCH_CUDA_ALLOC_CONF", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "CC", "CXX"),
    *("BITMILL_BACKEND", "BITMILL_CPU_KERNEL", "BITMILL_CUDA_LIBRARY", "TRITON_INTERPRET"),
)
"""Environment variables that the runner inherits: none of `Settings`, so no secret is there."""


_SECRETS = frozenset(f"BITMILL_{name}" for name in SECRET_SETTINGS)
"""What children with a network do not inherit."""


class Stopped(Exception):
    """The attempt ends early: "cancel", "deadline", "stopping", "stalled", "fenced", "lost"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Supervisor:
    """Claims jobs and sees each through to the end of its attempt."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.settings = settings
        self.store = JobStore(database)
        self.leases = LeaseStore(database, lease_s=settings.lease_s)
        self.catalog = Catalog(database)
        self.sweeps = SweepStore(database)
        self.keys = KeyStore(database)
        self.artifacts: ArtifactStore = open_artifacts(settings)

    def run_next(self, stop: StopRequest) -> bool:
        """Claim the next job of this worker's queues and run it; False where there is none."""
        job = self.leases.claim_next(self.settings.worker_name, self.settings.queues)
        if job is None:
            return False
        with log_fields(job_id=job.id, attempt=job.attempt, worker=self.settings.worker_name):
            _log.info("attempt starts")
            try:
                spec = parse_stored(job.kind, job.spec)
            except SpecError as error:
                # Stored by a version that knew other fields; no worker of this one can run it.
                self.leases.fail(job.id, job.token, error)
            else:
                Attempt(self, job, spec, stop).run()
        return True


class Attempt:
    """A claimed job, from claim to release."""

    def __init__(
        self, supervisor: Supervisor, job: JobRecord, spec: AnySpec, stop: StopRequest
    ) -> None:
        self.parts = supervisor
        self.settings = supervisor.settings
        self.job = job
        self.spec = spec
        self.stop = stop
        self.key = (job.id, job.token)
        eta = Eta(stage_seconds(supervisor.store.database, job.model))
        limit = self.settings.log_bytes
        self.reporter = Reporter(supervisor.leases, job, eta, log_limit=limit)
        self.folder = self.settings.job_folder(job.id).resolve() / f"attempt-{job.token}"
        self.renewed = time.monotonic()
        self.turns: SupervisorTurns | None = None
        if job.sweep_id is not None:
            self.turns = SupervisorTurns(
                supervisor.sweeps,
                supervisor.artifacts,
                job,
                self.settings.sweep_folder(job.sweep_id).resolve(),
                self.folder / "turns",
            )

    def run(self) -> None:
        """See the attempt through; every way out leaves the row, the files and no process."""
        keep_output = False
        try:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._settle(self._run())
                keep_output = self._is("succeeded")
            except Stopped as stopped:
                self._end_stopped(stopped.reason)
            except (BitmillError, OSError) as error:
                self._end_error(error)
        except Stopped as stopped:
            keep_output = stopped.reason == "lost"
            _log.warning("attempt gives up: %s", stopped.reason)
        finally:
            self._clean(keep_output)

    def _run(self) -> Ended:
        """The work itself, in a child."""
        match self.spec:
            case JobSpec() as spec:
                return self._run_pipeline(spec, self._fetch(spec.model))
            case ExportSpec() as spec:
                return self._run_export(spec)
            case PushSpec() as spec:
                return self._run_push(spec)

    def _fetch(self, model: ModelRef) -> Path:
        """The model's local folder."""
        if isinstance(model, UploadModel):
            fetch_upload(self.settings, self.parts.artifacts, model.upload_id)
        if not isinstance(model, HubModel):
            return local_model(model, self.settings).resolve()
        settings = self.settings
        request = {
            "model": model.model_dump(mode="json"),
            "data": str(settings.data.resolve()),
            "hub_endpoint": settings.hub_endpoint,
            "hub_patience_s": settings.hub_patience_s,
            "lease_s": settings.lease_s,
        }
        env = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        if settings.hub_token is not None and self._may_use_hub_token(model.repo_id):
            env["BITMILL_HUB_TOKEN"] = settings.hub_token.get_secret_value()
        message = f"downloading {model.repo_id}"
        self.reporter.message(
            {"kind": "stage", "stage": "resolve", "state": "started", "message": message}
        )
        ended = self._watch("bitmill_workers.execution.fetch", "fetch.json", request, env)
        self._raise_unless_ok(ended, "the downloader")
        return Path(self.reporter.result["folder"])

    def _may_use_hub_token(self, repo_id: str) -> bool:
        """Whether the job's maker may spend the operator's token; a revoked key may not."""
        if self.job.created_by is None:
            return True
        key = self.parts.keys.get(self.job.created_by)
        live = key.revoked_at is None
        return live and may_use_hub_token(key.scopes, key.limits, repo_id)

    def _run_pipeline(self, spec: JobSpec, model_folder: Path) -> Ended:
        parts = self.parts
        bit_widths = given_map(spec, parts.store, parts.catalog, parts.artifacts)
        parameters = fetch_parameters(
            spec, self.folder / "parameters", self.settings, parts.store, parts.artifacts
        )
        config = local_config(spec, self.settings, bit_widths, parameters)
        request = {
            "config": config.model_dump(mode="json"),
            "model_folder": str(model_folder),
            "gguf": spec.model.file,
            "model_name": self.job.model,
            "profile_folder": str(self.settings.profiles_folder.resolve()),
            "stage_folder": self._shared_stages(),
            "turns": str(self.folder / "turns"),
            "device": self.settings.device,
        }
        self.settings.profiles_folder.mkdir(parents=True, exist_ok=True)
        return self._run_child(request)

    def _run_export(self, spec: ExportSpec) -> Ended:
        packed = self.folder / "packed"
        fetch_files(spec.job_id, packed, self.parts.store, self.parts.artifacts, self._ticking)
        target = {"format": spec.format, "settings": spec.settings}
        return self._run_child({"packed": str(packed), "export": target})

    def _run_push(self, spec: PushSpec) -> Ended:
        parts, folder, report = self.parts, self.folder / "files", self.folder / QUALITY_NAME
        fetch_files(spec.job_id, folder, parts.store, parts.artifacts, self._ticking)
        told = parts.store.artifact(spec.packed_job, QUALITY_NAME)
        if told is not None:
            parts.artifacts.fetch(told, report)
        key, database = self.settings.push_key, parts.store.database
        token = open_token(database, key, self.job.id).get_secret_value()
        request = {
            "folder": str(folder),
            "report": None if told is None else str(report),
            "hub_endpoint": self.settings.hub_endpoint,
            "hub_patience_s": self.settings.hub_patience_s,
            "lease_s": self.settings.lease_s,
            **spec.model_dump(mode="json"),
        }
        env = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        env |= {PUSH_TOKEN: token}
        return self._watch("bitmill_workers.execution.pushing", "push.json", request, env)

    def _run_child(self, request: dict[str, Any]) -> Ended:
        """The runner, with what it is told whatever it does."""
        home = self.settings.job_folder(self.job.id).resolve()
        output = self.parts.artifacts.attempt_folder(*self.key).resolve()
        request |= {
            "label": self.spec.label,
            "job_dir": str(home / "work"),
            "output_dir": str(output),
            "lease_s": self.settings.lease_s,
            "lock": str(home / "runner.lock"),
            "file_bytes": self.settings.runner_file_bytes,
            "isolate": self.settings.runner_network == "isolate",
        }
        for folder in (home / "work", output.parent):
            folder.mkdir(parents=True, exist_ok=True)
        return self._watch(self.settings.runner_module, "runner.json", request, self._environment())

    def _shared_stages(self) -> str | None:
        """Where a sweep's jobs make equal stages once; None for a job of none.

        Profiles that another machine made for the sweep are fetched here.
        """
        if self.job.sweep_id is None:
            return None
        for made in self.parts.sweeps.profiles(self.job.sweep_id):
            self.parts.artifacts.fetch_folder(PROFILES, made, self.settings.profiles_folder / made)
        return str(self.settings.sweep_folder(self.job.sweep_id).resolve())

    def _environment(self) -> dict[str, str]:
        asked = self.spec.threads if isinstance(self.spec, JobSpec) else None
        threads = str(asked or self.settings.threads)
        scratch = self.folder / "tmp"
        scratch.mkdir(exist_ok=True)
        seen = {
            name: value
            for name, value in os.environ.items()
            if name in _RUNNER_SEES or name.startswith("NCCL_")
        }
        if self.settings.host_bytes is not None:
            seen["BITMILL_HOST_BYTES"] = str(self.settings.host_bytes)
        return seen | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(scratch),
        }

    def _watch(self, module: str, name: str, request: dict[str, Any], env: dict[str, str]) -> Ended:
        file = self.folder / name
        file.write_text(json.dumps(request))
        self.reporter.begin()
        self._tick_or_stop()
        child = Child(module, [str(file)], env)
        ended = child.watch(
            on_message=self._message,
            on_log=self.reporter.log,
            tick=lambda: self._tick(child.beat),
            tick_s=self.settings.poll_s,
            stall_s=self.settings.stall_s,
            wakeup_fd=self.stop.fd,
        )
        if ended.stopped is not None:
            raise Stopped(ended.stopped)
        if self.turns is not None:
            self._persist(self.turns.settle)
        return ended

    def _message(self, message: dict[str, Any]) -> None:
        if message.get("type") == "turn" and self.turns is not None:
            self.turns.message(message)
        else:
            self.reporter.message(message)

    def _tick(self, on_renewed: Callable[[], None] | None = None) -> str | None:
        """Report, renew when due, and say why the attempt must stop, if it must."""
        try:
            due = time.monotonic() >= self.renewed + self.settings.renew_s
            started = time.monotonic()
            answer = (self.parts.leases.renew if due else self.parts.leases.look)(*self.key)
            if answer.held and due:
                self.renewed = started
                if on_renewed is not None:
                    on_renewed()
            if not answer.held or not self.reporter.flush():
                return "fenced"
            if self.turns is not None:
                self.turns.tick()
        except DATABASE_ERRORS as error:
            _log.warning("the database is away: %s", type(error).__name__)
            return "lost" if self._lease_left() <= 0 else None
        if answer.cancel:
            return "cancel"
        if answer.overdue:
            return "deadline"
        return "stopping" if self.stop.requested else None

    def _tick_or_stop(self) -> None:
        if reason := self._tick():
            raise Stopped(reason)

    def _lease_left(self) -> float:
        """Seconds until this attempt must count its lease as lost, a sixth before it is."""
        return self.renewed + self.settings.lease_s * 5 / 6 - time.monotonic()

    def _persist(self, write: Callable[[], bool]) -> None:
        """Make a final write, repeating it while the database is away and the lease lasts."""
        while True:
            try:
                if not write():
                    raise Stopped("fenced")
                return
            except DATABASE_ERRORS as error:
                _log.warning("cannot write the end: %s", error)
                if self._lease_left() <= 0:
                    raise Stopped("lost") from error
                time.sleep(min(0.5, self.settings.poll_s))

    def _settle(self, ended: Ended) -> None:
        """The runner has ended by itself: publish, fail, or queue the job again."""
        self._raise_unless_ok(ended, "the runner")
        leases = self.parts.leases
        self._flush_rest()
        self._persist(lambda: leases.finalize(*self.key))
        files = [] if isinstance(self.spec, PushSpec) else self._publish()
        result, profile_id = self.reporter.result["result"], self.reporter.result.get("profile_id")
        if profile_id is not None:
            self._keep_profile(profile_id)
        if "made_for" in self.reporter.result:
            self._keep_map(self.reporter.result["made_for"])
        exports = self._exports()
        self._persist(
            lambda: leases.finish(*self.key, result, files, profile_id=profile_id, exports=exports)
        )
        _log.info("job succeeded")

    def _exports(self) -> list[ExportSpec]:
        """The jobs that follow this one."""
        spec = self.spec
        if not isinstance(spec, JobSpec):
            return []
        return [
            ExportSpec(**dict(one), model=spec.model, job_id=self.job.id, label=spec.label)
            for one in spec.exports
        ]

    def _publish(self) -> list[Artifact]:
        """Store the files."""
        return self._ticking(lambda: self.parts.artifacts.publish(*self.key, self._on_bytes))

    def _ticking(self, work: Callable[[], T]) -> T:
        """Do what may take long while the lease is kept; a stopping worker gets a moment for it."""
        with ThreadPoolExecutor(1) as pool:
            upload = pool.submit(work)
            asked: float | None = None
            while True:
                try:
                    return upload.result(timeout=self.settings.poll_s)
                except StillRunning:
                    reason = self._tick()
                    if reason in ("fenced", "lost"):
                        raise Stopped(reason) from None
                    asked = asked or (time.monotonic() if self.stop.requested else None)
                    if asked and time.monotonic() - asked > self.settings.stop_grace_s:
                        raise Stopped("stopping") from None

    def _on_bytes(self, done: int, total: int) -> None:
        self.reporter.message(
            {"kind": "progress", "stage": "publish", "done": done, "total": total, "unit": "byte"}
        )

    def _keep_profile(self, profile_id: str) -> None:
        folder = self.settings.profiles_folder / profile_id
        if folder.is_dir():
            self.parts.artifacts.share_folder(PROFILES, profile_id, folder)
        settings = {key: self.job.spec[key] for key in ("model", "calibration", "seed")}
        self.parts.catalog.add_profile(
            profile_id,
            model=self.job.model,
            settings=settings,
            path=profile_id,
            tenant=self.job.tenant,
        )

    def _keep_map(self, made_for: dict[str, Any] | None) -> None:
        """Let the map be found by the model that it was made for."""
        place = self.parts.artifacts.attempt_folder(*self.key) / MAP_NAME
        content = BitWidthMap.load(place).of(None).model_dump(mode="json")
        name = self.spec.label or self.job.model[:200]
        known = None if made_for is None else MadeFor.model_validate(made_for)
        self.parts.catalog.add_map(content, name=name, tenant=self.job.tenant, model=known)

    def _raise_unless_ok(self, ended: Ended, child: str) -> None:
        """Raise what the child told, else how it died."""
        if ended.status != 0 or not self.reporter.result:
            raise self.reporter.error or death(
                child, ended.status, code="runner_crashed", said=ended.said
            )

    def _flush_rest(self) -> None:
        self._persist(self.reporter.flush)

    def _end_stopped(self, reason: str) -> None:
        """The child is gone; write why."""
        leases = self.parts.leases
        if reason in ("fenced", "lost"):
            raise Stopped(reason)
        self._flush_rest()
        match reason:
            case "cancel":
                self._persist(lambda: leases.cancelled(*self.key))
            case "deadline":
                late = DeadlinePassed(f"not finished within deadline_s={self.spec.deadline_s}")
                self._persist(lambda: leases.fail(*self.key, late))
            case "stalled":
                stalled = ProcessFailed(
                    f"no progress for {self.settings.stall_s:g} s; stacks are in the log",
                    code="stalled",
                )
                self._persist(lambda: leases.fail(*self.key, stalled))
            case _:
                retries = self.settings.handback_retries
                self._persist(lambda: leases.hand_back(*self.key, reason, retries=retries))

    def _end_error(self, error: Exception) -> None:
        """The job cannot be run, or a process of it failed."""
        leases, failure = self.parts.leases, as_bitmill_error(error)
        if failure.code == "disk_full":
            self._make_room()
        self._flush_rest()
        match then(failure):
            case Then.FAIL:
                self._persist(lambda: leases.fail(*self.key, failure))
            case Then.LARGER:
                queue = next_tier(self.job.queue)
                self._persist(lambda: leases.retry_larger(*self.key, queue, failure))
            case Then.AGAIN:
                retries = self.settings.crash_retries
                self._persist(lambda: leases.retry_crash(*self.key, failure, retries=retries))

    def _make_room(self) -> None:
        """Remove the files of a job that ends on a full disk, before its end is written: the
        database may lie on that disk, and then nobody could write anything any more."""
        try:
            held = self.parts.leases.look(*self.key).held
        except DATABASE_ERRORS:
            return
        if held:
            with suppress(BitmillError):
                self.parts.artifacts.remove(*self.key)
            shutil.rmtree(self.settings.job_folder(self.job.id), ignore_errors=True)

    def _is(self, state: str) -> bool:
        try:
            return self.parts.store.get(self.job.id).state == state
        except (*DATABASE_ERRORS, BitmillError):
            return True

    def _clean(self, keep_output: bool) -> None:
        """Remove the attempt's scratch files, and its output unless it may be visible."""
        shutil.rmtree(self.folder, ignore_errors=True)
        store = self.parts.artifacts
        try:
            (store.drop_local if keep_output else store.remove)(*self.key)
        except BitmillError as error:
            _log.warning("files are left to the reconciler: %s", error)
        try:
            finished = self.parts.store.get(self.job.id).finished
        except BitmillError:
            finished = True
        except DATABASE_ERRORS:
            finished = False
        if finished:
            shutil.rmtree(self.settings.job_folder(self.job.id), ignore_errors=True)
