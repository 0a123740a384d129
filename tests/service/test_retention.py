"""What goes, what stays, and what an operator can do about it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from bitmill_service.client.client import Client
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.messaging.app import Dispatcher
from bitmill_workers.messaging.reconcile import Reconciler
from bitmill_workers.storage.garbage import collect_hub
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.keys import KeyStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.limits import Limits
from bitmill_workers.store.migrate import upgrade
from bitmill_workers.store.records import JobRecord
from bitmill_workers.store.retention import leaving
from finished import Stack, spec_json
from serving import serve
from stores import QUEUES, set_columns, spec


@pytest.fixture
def kept(tmp_path: Path, models: Path) -> Iterator[Stack]:
    """A service of its own, whose reconciler runs when a test says so."""
    settings = ServiceSettings(data=tmp_path / "data", model_roots={"models": models}, keep_days=2)
    app = create_app(settings)
    upgrade(app.state.context.database)
    with serve(app, lifespan="off") as url:
        yield Stack(url, app.state.context)
    app.state.context.database.close()


def collect(kept: Stack) -> None:
    dispatcher = Dispatcher(kept.context.settings, lambda ids: None)
    try:
        Reconciler(kept.context.settings, kept.context.database, dispatcher).collect_garbage()
    finally:
        dispatcher.close()


def aged(kept: Stack, days: float) -> JobRecord:
    """A succeeded job that ended so long ago and may be kept two days."""
    job = kept.succeeded()
    ended = kept.context.database.now() - days * 86400
    set_columns(kept.context.database, job.id, finished_at=ended, keep_days=2)
    return job


def test_files_go_after_their_time_and_events_say_why(kept: Stack) -> None:
    old, young, pinned = aged(kept, 2.1), aged(kept, 1.9), aged(kept, 50)
    with Client(kept.url) as client:
        assert client.pin(pinned.id).pinned
        collect(kept)
        gone, stays, held = (client.get(job.id) for job in (old, young, pinned))
        assert gone.discarded_at is not None
        assert stays.files_until is not None
        assert (stays.discarded_at, held.discarded_at, held.files_until) == (None, None, None)
        events = client.event_page(old.id).events
        assert events[-1].kind == "discarded"
        assert events[-1].data["reason"] == "kept for 2 days"
        assert events[-1].data["bytes"] > 0
        assert [e.kind for e in client.event_page(pinned.id).events][-1] == "pinned"
    answer = httpx2.get(f"{kept.url}/v1/jobs/{old.id}/files")
    assert (answer.status_code, answer.json()["code"]) == (410, "files_discarded")
    hub = httpx2.get(f"{kept.url}/api/models/jobs/{old.id}")
    assert (hub.status_code, hub.headers["x-error-code"]) == (404, "RepoNotFound")
    artifacts = kept.context.settings.artifacts_folder
    assert {p.name for p in artifacts.iterdir()} == {young.id, pinned.id}


def result(kept: Stack, days: float, tenant: str = "local") -> str:
    """A job that ended so long ago with some 100 kB of files, kept for good; its id."""
    job = kept.succeeded(os.urandom(100_000))
    ended = kept.context.database.now() - days * 86400
    columns = {"finished_at": ended, "keep_days": None, "tenant": tenant}
    set_columns(kept.context.database, job.id, **columns)
    return job.id


def test_over_the_kept_bytes_the_oldest_results_go_and_say_why(
    kept: Stack, command: Callable[..., tuple[int, str, str]]
) -> None:
    latest, second, needed, pinned, first = (result(kept, days) for days in range(1, 6))
    others = [result(kept, days, tenant="others") for days in (8, 9)]
    kept.context.jobs.pin(pinned, True)
    given = {"source": "job", "job_id": needed}
    kept.queued(allocation={"method": "map", "order": "natural", "map": given})
    assert leaving(kept.context.database, None) == ()
    assert leaving(kept.context.database, 10_000_000) == ()
    assert [one.job.id for one in leaving(kept.context.database, 450_000)] == [first]
    keys = KeyStore(kept.context.database)
    keys.create("small", scopes=["read"], tenant="local", limits=Limits(keep_bytes=50_000))
    large, _ = keys.create("l", scopes=["read"], tenant="local", limits=Limits(keep_bytes=350_000))
    data = ("--data", kept.context.settings.data)
    shown = json.loads(command("prune", "--dry-run", "--json", *data)[1])
    assert {row["name"] for row in shown["found"]} == {first, second}
    assert kept.context.jobs.get(first).discarded_at is None
    collect(kept)
    gone = {job for job in (latest, second, needed, pinned, first, *others) if discarded(kept, job)}
    assert gone == {first, second}
    event = kept.context.jobs.events(first)[-1]
    assert event.kind == "discarded"
    assert event.data["bytes"] > 100_000
    assert "of local took" in event.data["reason"]
    assert "350,000 are kept" in event.data["reason"]
    keys.revoke(large.split("_")[1])
    collect(kept)
    assert not discarded(kept, latest), "the latest result stays, however little may be kept"
    assert [one.job.id for one in leaving(kept.context.database, 1)] == [others[1]]


def discarded(kept: Stack, job: str) -> bool:
    return kept.context.jobs.get(job).discarded_at is not None


def test_what_an_unfinished_job_needs_stays(kept: Stack) -> None:
    old = aged(kept, 9)
    given = {"source": "job", "job_id": old.id}
    waiting = kept.queued(allocation={"method": "map", "order": "natural", "map": given})
    collect(kept)
    assert kept.context.jobs.get(old.id).discarded_at is None
    kept.context.jobs.request_cancel(waiting.id)
    collect(kept)
    assert kept.context.jobs.get(old.id).discarded_at is not None


def test_submitted_jobs_are_kept_as_settings_and_keys_say(kept: Stack) -> None:
    with httpx2.Client(base_url=kept.url, timeout=60) as http:
        job = http.post("/v1/jobs", json=spec_json()).json()["id"]
        assert kept.context.jobs.get(job).keep_days == 2
        admin = http.post("/v1/keys", json={"name": "ops", "scopes": ["admin"]}).json()["key"]
        http.headers["Authorization"] = f"Bearer {admin}"
        body = {"name": "short", "limits": {"keep_days": 0.5}}
        key = http.post("/v1/keys", json=body).json()["key"]
        headers = {"Authorization": f"Bearer {key}"}
        job = http.post("/v1/jobs", json=spec_json(), headers=headers).json()["id"]
        assert kept.context.jobs.get(job).keep_days == 0.5


def test_maps_and_profiles_can_be_deleted_and_others_keep_theirs(kept: Stack) -> None:
    catalog = kept.context.catalog
    with httpx2.Client(base_url=kept.url, timeout=60) as http:
        made = http.post("/v1/bit-width-maps", json={"linears": {"a": "33"}}).json()["id"]
        assert http.delete(f"/v1/bit-width-maps/{made}").status_code == 204
        assert http.delete(f"/v1/bit-width-maps/{made}").json()["code"] == "map_not_found"
        folder = kept.context.settings.profiles_folder / "p1"
        folder.mkdir(parents=True)
        for tenant in ("alice", "bob"):
            catalog.add_profile("p1", model="m", settings={}, path="p1", tenant=tenant)
        assert not catalog.drop("profile", "p1", tenant="alice")
        assert catalog.profile("p1", tenant="alice") is None
        assert catalog.profile("p1", tenant="bob") is not None
        running = kept.running()
        set_columns(kept.context.database, running.id, profile_id="p1")
        answer = http.delete("/v1/profiles/p1")
        assert (answer.status_code, answer.json()["code"]) == (409, "profile_in_use")
        set_columns(kept.context.database, running.id, profile_id=None)
        assert http.delete("/v1/profiles/p1").status_code == 204
        assert not folder.exists()
        assert http.delete("/v1/profiles/p1").json()["code"] == "profile_not_found"


def test_the_hub_cache_stays_below_its_limit_and_keeps_what_is_needed(kept: Stack) -> None:
    context = kept.context
    settings = context.settings.model_copy(update={"hub_cache_bytes": 250})
    for name in ("org--old", "org--needed", "org--new"):
        folder = settings.hub_cache / f"models--{name}" / "blobs"
        folder.mkdir(parents=True)
        (folder / "x").write_bytes(b"x" * 100)
    kept.queued(model={"source": "hub", "repo_id": "org/needed", "revision": "v1"})
    assert collect_hub(settings, context.database) == 1
    left = {p.name for p in settings.hub_cache.iterdir()}
    assert len(left) == 2
    assert "models--org--needed" in left
    assert collect_hub(settings, context.database) == 0


def test_prune_shows_first_and_removes_then(
    kept: Stack, command: Callable[..., tuple[int, str, str]]
) -> None:
    old, young = aged(kept, 3), aged(kept, 1)
    data = ("--data", kept.context.settings.data)
    shown = json.loads(command("prune", "--dry-run", "--json", *data)[1])
    assert [(row["kind"], row["name"]) for row in shown["found"]] == [("job", old.id)]
    place = kept.context.settings.artifacts_folder / old.id
    assert place.is_dir()
    code, out, _ = command("prune", *data)
    assert code == 0
    assert old.id in out
    assert not place.exists()
    assert (kept.context.settings.artifacts_folder / young.id).is_dir()
    assert json.loads(command("prune", "--json", *data)[1])["found"] == []


def test_a_backup_of_a_service_that_runs_is_restored_elsewhere(
    kept: Stack, command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    done, waiting = kept.succeeded(b"the weights" * 999), kept.queued()
    profile = kept.context.settings.profiles_folder / "p" / "profile.json"
    profile.parent.mkdir(parents=True)
    profile.write_text("{}")
    data = kept.context.settings.data
    told = json.loads(command("backup", tmp_path / "b", "--data", data, "--json")[1])
    assert (told["files"], told["missing"]) == (5, [])
    kept.context.jobs.delete(done.id)
    assert command("backup", tmp_path / "b", "--data", data)[0] == 2  # not over another one
    new = tmp_path / "new"
    assert command("restore", tmp_path / "b", "--data", new)[0] == 0
    assert command("restore", tmp_path / "b", "--data", new)[0] == 2
    assert command("restore", tmp_path / "none", "--data", tmp_path / "x")[0] == 2
    assert (new / "profiles" / "p" / "profile.json").is_file()
    app = create_app(ServiceSettings(data=new))
    with serve(app) as url, Client(url) as client:
        assert client.get(waiting.id).state == "queued"
        out = client.download(done.id, tmp_path / "out")
        assert "model.safetensors" in out.fetched
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"the weights" * 999


def test_a_backup_that_was_broken_off_is_none(
    kept: Stack, command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    settings = kept.context.settings
    (file, *_) = kept.context.jobs.artifacts(kept.succeeded().id)
    in_the_way = settings.artifacts_folder / file.storage_key
    in_the_way.unlink()
    in_the_way.mkdir()  # cannot be copied
    assert command("backup", tmp_path / "b", "--data", settings.data)[0] == 1
    code, _, err = command("restore", tmp_path / "b", "--data", tmp_path / "new")
    assert (code, "is no backup" in err) == (2, True)


def test_files_that_a_backup_lacks_are_told(
    kept: Stack, command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    settings = kept.context.settings
    kept.succeeded()
    first, second, *_ = kept.context.jobs.artifacts(kept.succeeded().id)
    (settings.artifacts_folder / first.storage_key).unlink()
    for name in ("uploads", "profiles"):
        (settings.data / name).mkdir(exist_ok=True)
        (settings.data / name / "gone").symlink_to("deleted since the folder was read")
    code, _, err = command("backup", tmp_path / "b", "--data", settings.data)
    assert code == 0
    assert f"1 files of 1 jobs are not there, or not whole, such as {first.storage_key}" in err
    assert command("restore", tmp_path / "b", "--data", tmp_path / "new")[0] == 0
    with (tmp_path / "b" / "artifacts" / second.storage_key).open("wb") as cut:
        cut.write(b"")
    told = json.loads(command("restore", tmp_path / "b", "--data", tmp_path / "2", "--json")[1])
    assert sorted(told["missing"]) == sorted([first.storage_key, second.storage_key])


def test_queues_and_workers_pause_and_go_on(
    kept: Stack, command: Callable[..., tuple[int, str, str]]
) -> None:
    context = kept.context
    leases = LeaseStore(context.database, lease_s=60)
    context.catalog.beat("w1", host="h", queues=("cpu",), device="cpu", version="1")
    first = JobStore(context.database).submit(spec()).job
    words = ("--url", kept.url)
    assert "paused queues: cpu" in command("workers", "pause", "--queue", "cpu", *words)[1]
    assert leases.claim_next("w1", QUEUES) is None
    assert "paused queues: none" in command("workers", "resume", "--queue", "cpu", *words)[1]
    assert "takes no more jobs" in command("workers", "pause", "w1", *words)[1]
    assert leases.claim_next("w1", QUEUES) is None
    other = leases.claim_next("w2", QUEUES)
    assert other is not None
    assert other.id == first.id
    assert "live" in command("workers", "resume", "w1", *words)[1]
    kept.queued()
    assert leases.claim_next("w1", QUEUES) is not None
    assert command("workers", "pause", *words)[0] == 2
    code, _, err = command("workers", "pause", "w3", *words)
    assert (code, "no live worker is called w3" in err) == (0, True)
    assert command("workers", "pause", "--queue", "none", *words)[0] == 2
