"""What unfinished jobs need is not deleted, whoever comes first."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa

from bitmill.errors import InputError
from bitmill_workers.errors import StateConflict
from bitmill_workers.job_spec import AnySpec, ExportSpec, PathModel, PushSpec, parse_spec
from bitmill_workers.store.catalog import Catalog
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore, insert_job, new_job
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.records import Artifact, JobRecord
from bitmill_workers.store.retention import leaving
from bitmill_workers.store.sweeps import SweepStore
from bitmill_workers.store.tables import uploads
from bitmill_workers.store.uploads import UploadFile, UploadStore
from stores import claim, set_columns, spec, wait_for

pytestmark = pytest.mark.parametrize("dialect", ["sqlite", "postgresql"])

SPEC = spec().model_dump(mode="json")
MAP = {"method": "map", "order": "natural"}
MODEL = PathModel(path="models/tiny")


@dataclass
class World:
    """One of everything that a job may need, and how to delete it."""

    database: Database
    upload: str
    job: str
    map: str

    def delete(self, what: str, tenant: str | None = "local") -> None:
        match what:
            case "upload":
                UploadStore(self.database).delete(self.upload, tenant=tenant)
            case "job":
                JobStore(self.database).delete(self.job, tenant=tenant)
            case "map":
                Catalog(self.database).drop("map", self.map, tenant=tenant)

    def there(self, what: str) -> bool:
        match what:
            case "upload":
                return bool(UploadStore(self.database).list())
            case "job":
                return any(job.id == self.job for job in JobStore(self.database).list().jobs)
            case _:
                return Catalog(self.database).map(self.map) is not None

    def specification(self, named: str) -> AnySpec:
        """A job that names something in this place."""
        learned = {"method": "omniquant"}
        match named:
            case "model":
                return parse_spec(SPEC | {"model": {"source": "upload", "upload_id": self.upload}})
            case "parameters":
                given = {"source": "upload", "upload_id": self.upload}
                learning = learned | {"omniquant": {"resume_parameters": given}}
                return parse_spec(SPEC | {"refinement": learning})
            case "parameters of a job":
                given = {"source": "job", "job_id": self.job}
                learning = learned | {"omniquant": {"resume_parameters": given}}
                return parse_spec(SPEC | {"refinement": learning})
            case "map":
                given = {"source": "upload", "map_id": self.map}
                return parse_spec(SPEC | {"allocation": MAP | {"map": given}})
            case "map of a job":
                given = {"source": "job", "job_id": self.job}
                return parse_spec(SPEC | {"allocation": MAP | {"map": given}})
            case "export":
                return ExportSpec(format="gptq", model=MODEL, job_id=self.job)
            case _:
                return PushSpec(repo_id="a/b", model=MODEL, job_id=self.job, packed_job=self.job)


NAMED = [
    *(("model", "upload"), ("parameters", "upload"), ("map", "map"), ("map of a job", "job")),
    *(("parameters of a job", "job"), ("export", "job"), ("push", "job")),
]


@pytest.fixture
def world(database: Database, store: JobStore, leases: LeaseStore) -> World:
    files = [UploadFile("model.safetensors", 1, "0" * 64)]
    upload = UploadStore(database).announce(files, tenant="local", keep_s=60)
    stored = Catalog(database).add_map({"linears": {"a": "33"}})
    return World(database, upload.id, succeeded(store, leases).id, stored.id)


def succeeded(store: JobStore, leases: LeaseStore, **options: Any) -> JobRecord:
    job = claim(leases, store.submit(spec(), **options).job.id)
    assert leases.finalize(job.id, job.token)
    file = Artifact("model.safetensors", 9, "0" * 64, f"{job.id}/1/model.safetensors")
    assert leases.finish(job.id, job.token, {}, [file])
    return store.get(job.id)


@pytest.mark.parametrize(("named", "what"), NAMED)
def test_what_a_job_names_stays_until_it_has_ended(
    world: World, store: JobStore, leases: LeaseStore, named: str, what: str
) -> None:
    job = store.submit(world.specification(named)).job
    wanted = f"job {job.id} needs {what} "
    with pytest.raises(StateConflict, match=wanted) as refused:
        world.delete(what)
    assert refused.value.code == f"{what}_in_use"
    token = claim(leases, job.id).token
    with pytest.raises(StateConflict, match=wanted):
        world.delete(what)
    assert world.there(what)
    assert leases.fail(job.id, token, InputError("no"))
    world.delete(what)
    assert not world.there(what)
    with pytest.raises(InputError, match="was deleted") as late:
        store.submit(world.specification(named))
    assert late.value.code == f"{what}_not_found"
    assert store.counts().get("queued", 0) == 0


def test_jobs_that_only_mention_it_do_not_keep_it(world: World, store: JobStore) -> None:
    model = {"source": "upload", "upload_id": world.upload}
    export = ExportSpec.model_validate(
        {"format": "gptq", "model": model, "job_id": world.job, "label": world.map}
    )
    assert store.submit(export).job.state == "queued"
    world.delete("upload")
    world.delete("map")


def test_another_tenant_is_not_told_which_job(world: World, store: JobStore) -> None:
    job = store.submit(world.specification("model"), tenant="ops").job
    with pytest.raises(StateConflict, match="a job of another tenant needs upload") as refused:
        world.delete("upload", tenant="local")
    assert job.id not in refused.value.message
    with pytest.raises(StateConflict, match=f"job {job.id}"):
        world.delete("upload", tenant=None)


def test_a_map_that_another_holds_can_be_let_go(world: World, store: JobStore) -> None:
    Catalog(world.database).add_map({"linears": {"a": "33"}}, tenant="bob")
    store.submit(world.specification("map"))
    world.delete("map")
    with pytest.raises(StateConflict, match="a job of another tenant needs map"):
        Catalog(world.database).drop("map", world.map, tenant="bob")
    assert Catalog(world.database).map(world.map, tenant="bob") is not None


def test_a_sweep_stays_while_an_export_of_a_cell_waits(
    world: World, store: JobStore, leases: LeaseStore
) -> None:
    sweeps = SweepStore(world.database)
    sweep, _ = sweeps.submit({}, [(1, spec(), "cpu")], label=None, tenant="local")
    cell = claim(leases, sweeps.cells(sweep.id)[1].id)
    assert leases.finalize(cell.id, cell.token)
    export = ExportSpec(format="gptq", model=MODEL, job_id=cell.id)
    assert leases.finish(cell.id, cell.token, {}, [], exports=[export])
    with pytest.raises(StateConflict, match=f"needs job {cell.id}") as refused:
        sweeps.delete(sweep.id)
    assert refused.value.code == "job_in_use"
    store.request_cancel(store.list(kind="export").jobs[0].id)
    sweeps.delete(sweep.id)


def test_files_that_a_job_needs_are_not_discarded_behind_it(world: World, store: JobStore) -> None:
    (due,) = leaving_soon(world)
    waiting = store.submit(world.specification("export")).job
    assert leaving(world.database, None) == ()
    assert store.discard(due, "it is old") == 0
    assert store.get(due).discarded_at is None
    store.request_cancel(waiting.id)
    assert store.discard(due, "it is old") == 9
    with pytest.raises(InputError, match="were discarded"):
        store.submit(world.specification("export"))
    card = PushSpec(repo_id="a/b", model=MODEL, job_id=waiting.id, packed_job=world.job)
    assert store.submit(card).job.state == "queued"


def leaving_soon(world: World) -> list[str]:
    set_columns(world.database, world.job, finished_at=0.0, keep_days=1.0)
    return [one.job.id for one in leaving(world.database, None)]


def test_an_upload_expires_when_no_job_needs_it(world: World, store: JobStore) -> None:
    everything = UploadStore(world.database)
    with world.database.write() as conn:
        conn.execute(sa.update(uploads).values(expires_at=0.0))
    job = store.submit(world.specification("parameters")).job
    assert everything.expire() == ()
    store.request_cancel(job.id)
    assert [upload.id for upload in everything.expire()] == [world.upload]


def test_a_profile_that_a_running_job_works_with_stays(
    world: World, store: JobStore, leases: LeaseStore, catalog: Catalog
) -> None:
    job = claim(leases, store.submit(spec()).job.id)
    for tenant in ("local", "bob"):
        catalog.add_profile("p", model="m", settings={}, path="p", tenant=tenant)
    assert leases.report(job.id, job.token, [], profile_id="p")
    assert not catalog.drop("profile", "p", tenant="bob")
    with pytest.raises(StateConflict, match=f"job {job.id} needs profile p") as refused:
        catalog.drop("profile", "p", tenant="local")
    assert refused.value.code == "profile_in_use"
    assert catalog.profile("p", tenant="local") is not None


@pytest.mark.parametrize(
    ("named", "what"), [("model", "upload"), ("export", "job"), ("map", "map")]
)
def test_a_deletion_waits_for_a_submission_and_sees_it(world: World, named: str, what: str) -> None:
    columns = dict.fromkeys(("parent_id", "webhook_url", "created_by", "max_running", "keep_days"))
    given = {"tenant": "local", "queue": "cpu", "priority": 0} | columns
    with ThreadPoolExecutor(1) as pool:
        with world.database.write() as conn:
            insert_job(conn, new_job(world.specification(named), **given))
            deletion = pool.submit(world.delete, what)
            wait_for(waits_for_lock(world.database, deletion), "the deletion to wait")
            assert not deletion.done()
        with pytest.raises(StateConflict, match="needs"):
            deletion.result(60)
    assert world.there(what)


@pytest.mark.parametrize(
    ("named", "what"), [("model", "upload"), ("export", "job"), ("map", "map")]
)
def test_a_submission_waits_for_a_deletion_and_is_refused(
    world: World, store: JobStore, named: str, what: str
) -> None:
    submissions: list[Future[Any]] = []
    with ThreadPoolExecutor(1) as pool:

        def meanwhile(conn: sa.Connection, cursor: Any, statement: str, *_: Any) -> None:
            """The row is locked: now a job is submitted."""
            if statement.startswith("DELETE") and not submissions:
                submissions.append(pool.submit(store.submit, world.specification(named)))
                blocked = waits_for_lock(world.database, submissions[0])
                wait_for(blocked, "the submission to wait")

        sa.event.listen(world.database.engine, "before_cursor_execute", meanwhile)
        world.delete(what)
        sa.event.remove(world.database.engine, "before_cursor_execute", meanwhile)
        with pytest.raises(InputError, match="was deleted"):
            submissions[0].result(60)
    assert not world.there(what)


def waits_for_lock(database: Database, other: Future[Any]) -> Callable[[], bool]:
    """Whether what was started waits for a lock, or is done; SQLite cannot tell, but it does."""

    def look() -> bool:
        if database.dialect == "sqlite" or other.done():
            return True
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        with database.read() as conn:
            waiting = conn.exec_driver_sql(f"{query} AND wait_event_type = 'Lock'")
            return bool(waiting.scalar_one())

    return look
