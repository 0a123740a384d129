"""The object store over HTTP, against moto's server on loopback."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import httpx2
import pytest
from pydantic import SecretStr

from bitmill.io.manifest import write_manifest
from bitmill_workers.execution.stop import StopRequest
from bitmill_workers.execution.supervisor import Supervisor
from bitmill_workers.messaging.reconcile import Reconciler
from bitmill_workers.settings import Settings
from bitmill_workers.storage.artifacts import STAGES, UPLOADS
from bitmill_workers.storage.garbage import collect_stages
from bitmill_workers.storage.open import open_artifacts
from bitmill_workers.storage.s3 import S3Artifacts, StorageUnavailable
from bitmill_workers.storage.uploads import UploadFolder, fetch_upload, reopen_lost
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.sweeps import SweepStore
from bitmill_workers.store.uploads import UploadFile, UploadStore
from servers import free_port
from stores import spec
from tcp_proxy import TcpProxy

moto = pytest.importorskip("moto.server", reason="moto is not installed")


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    port = free_port()
    running = moto.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    running.start()
    yield port
    running.stop()


@pytest.fixture
def proxy(server: int) -> Iterator[TcpProxy]:
    between = TcpProxy(server)
    yield between
    between.close()


@pytest.fixture
def stored(settings: Settings, server: int, proxy: TcpProxy, tmp_path: Path) -> Settings:
    bucket = f"test-{abs(hash(tmp_path.name))}"
    changed = settings.model_copy(
        update={
            "s3_bucket": bucket,
            "s3_endpoint": f"http://127.0.0.1:{proxy.port}",
            "s3_access_key": "key",
            "s3_secret_key": SecretStr("not-a-default"),
        }
    )
    boto3.client(
        "s3",
        endpoint_url=changed.s3_endpoint,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="not-a-default",
    ).create_bucket(Bucket=bucket)
    return changed


def test_two_workers_with_folders_of_their_own_make_a_stage_once(
    stored: Settings, database: Database, tmp_path: Path
) -> None:
    """Each has a data folder; database and object store are all that they share."""
    sweeps = SweepStore(database)
    cells = [(number, spec(seed=number, label="1.5"), "cpu") for number in (1, 2)]
    sweep, _ = sweeps.submit({"grid": {}}, cells, label=None, tenant="local")

    def work(name: str) -> None:
        changes = {
            "data": tmp_path / "machines" / name,
            "worker_name": name,
            "runner_module": "sharing_runner",
            "database_url": str(stored.database),
        }
        assert Supervisor(stored.model_copy(update=changes), database).run_next(stop)

    with StopRequest() as stop, ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, name) for name in ("one", "two")]:
            done.result(60)
    jobs = sweeps.cells(sweep.id).values()
    assert [job.state for job in jobs] == ["succeeded"] * 2, [job.error for job in jobs]
    assert (tmp_path / "machines" / "made").read_text().count("\n") == 1
    assert len({(job.result or {})["found"] for job in jobs}) == 1
    places = [tmp_path / "machines" / name / "sweeps" / sweep.id for name in ("one", "two")]
    (stage,), (same,) = ([f.name for f in place.glob("profile-*")] for place in places)
    assert stage == same
    store = open_artifacts(stored)
    assert store.fetch_folder(STAGES, f"{sweep.id}/{stage}", tmp_path / "kept")
    assert collect_stages(store, database) == 1
    assert not store.fetch_folder(STAGES, f"{sweep.id}/{stage}", tmp_path / "gone")
    assert collect_stages(store, database) == 0


def fill(folder: Path, size: int) -> bytes:
    folder.mkdir(parents=True)
    data = os.urandom(size)
    (folder / "model.safetensors").write_bytes(data)
    write_manifest(folder)
    return data


def test_large_file_is_uploaded_in_parts_and_downloaded_by_address(stored: Settings) -> None:
    store = open_artifacts(stored)
    assert isinstance(store, S3Artifacts)
    data = fill(store.attempt_folder("job", 1), (16 << 20) + 5)
    seen: list[tuple[int, int]] = []
    files = {f.path: f for f in store.publish("job", 1, lambda *at: seen.append(at))}
    assert sorted(files) == ["MANIFEST.json", "SHA256SUMS", "model.safetensors"]
    assert seen[-1][0] == seen[-1][1] == sum(f.size for f in files.values())
    file = files["model.safetensors"]
    assert store.local_path(file) is None
    url = store.url(file)
    assert url is not None
    got = httpx2.get(url, headers={"Range": "bytes=1-"})
    assert (got.status_code, got.content) == (206, data[1:])
    assert hashlib.sha256(store.read(file)).hexdigest() == file.sha256
    assert list(store.attempts()) == [("job", 1)]
    store.drop_local("job", 1)
    assert list(store.attempts()) == [("job", 1)]
    store.remove("job", 1)
    assert list(store.attempts()) == []


def test_job_is_published_whole_and_losers_are_collected(
    stored: Settings, database: Database
) -> None:
    supervisor = Supervisor(stored, database)
    job = supervisor.store.submit(spec(label="steps=1")).job
    with StopRequest() as stop:
        assert supervisor.run_next(stop)
    job = supervisor.store.get(job.id)
    assert (job.state, job.error_message) == ("succeeded", None)
    assert not list(stored.artifacts_folder.glob("*"))
    store = open_artifacts(stored)
    for token in (0, 7):
        fill(store.attempt_folder(job.id, token), 10)
        store.publish(job.id, token, lambda *_: None)
    from bitmill_workers.messaging.app import Dispatcher

    dispatcher = Dispatcher(stored, lambda _: None)
    Reconciler(stored, database, dispatcher).collect_garbage()
    dispatcher.close()
    assert list(store.attempts()) == [(job.id, 1)]
    for file in JobStore(database).artifacts(job.id):
        assert hashlib.sha256(store.read(file)).hexdigest() == file.sha256


def test_store_that_is_away_makes_nothing_visible_and_the_job_runs_again(
    stored: Settings, database: Database, proxy: TcpProxy
) -> None:
    supervisor = Supervisor(stored, database)
    job = supervisor.store.submit(spec(label="steps=1")).job
    supervisor.artifacts = open_artifacts(
        stored.model_copy(update={"s3_endpoint": "http://127.0.0.1:1"})
    )
    with StopRequest() as stop:
        assert supervisor.run_next(stop)
        again = supervisor.store.get(job.id)
        assert (again.state, again.crash_count) == ("queued", 1)
        assert supervisor.store.artifacts(job.id) == ()
        supervisor.artifacts = open_artifacts(stored)
        assert supervisor.run_next(stop)
    assert supervisor.store.get(job.id).state == "succeeded"


def test_garbage_search_needs_the_store_and_leaves_foreign_objects(stored: Settings) -> None:
    away = open_artifacts(stored.model_copy(update={"s3_endpoint": "http://127.0.0.1:1"}))
    with pytest.raises(StorageUnavailable):
        list(away.attempts())
    store = open_artifacts(stored)
    assert isinstance(store, S3Artifacts)
    key = f"{stored.s3_prefix}/notes/of-somebody/text"
    store._client.put_object(Bucket=stored.s3_bucket, Key=key, Body=b"x")
    assert list(store.attempts()) == []


def test_unreadable_object_is_an_error_of_its_own(stored: Settings) -> None:
    store = open_artifacts(stored)
    fill(store.attempt_folder("job", 1), 10)
    file = store.publish("job", 1, lambda *_: None)[0]
    store.remove("job", 1)
    with pytest.raises(StorageUnavailable):
        store.read(file)
    with pytest.raises(StorageUnavailable):
        store.fetch(file, stored.data / "file")


def test_object_is_fetched_to_a_file(stored: Settings) -> None:
    store = open_artifacts(stored)
    data = fill(store.attempt_folder("job", 1), 1000)
    files = {f.path: f for f in store.publish("job", 1, lambda *_: None)}
    store.drop_local("job", 1)
    stored.data.mkdir(exist_ok=True)
    store.fetch(files["model.safetensors"], stored.data / "file")
    assert (stored.data / "file").read_bytes() == data


def test_profile_made_here_is_found_elsewhere(stored: Settings, tmp_path: Path) -> None:
    store = open_artifacts(stored)
    made = tmp_path / "made"
    (made / "deep").mkdir(parents=True)
    (made / "deep" / "costs.bin").write_bytes(b"12")
    store.share_folder("profiles", "abc", made)
    elsewhere = tmp_path / "profiles" / "abc"
    assert store.fetch_folder("profiles", "abc", elsewhere)
    assert (elsewhere / "deep" / "costs.bin").read_bytes() == b"12"
    assert [p.name for p in elsewhere.parent.iterdir()] == ["abc"]
    assert not store.fetch_folder("profiles", "absent", tmp_path / "profiles" / "absent")
    assert list(store.attempts()) == []


def test_profile_can_be_fetched_twice_at_once(stored: Settings, tmp_path: Path) -> None:
    store = open_artifacts(stored)
    made = tmp_path / "made"
    made.mkdir()
    (made / "costs.bin").write_bytes(b"12" * 1000)
    store.share_folder("profiles", "abc", made)
    elsewhere = tmp_path / "profiles" / "abc"
    with ThreadPoolExecutor(4) as pool:
        fetched = list(
            pool.map(lambda _: store.fetch_folder("profiles", "abc", elsewhere), range(4))
        )
    assert fetched == [True] * 4
    assert (elsewhere / "costs.bin").stat().st_size == 2000


def test_an_upload_is_open_again_where_the_object_store_lost_a_file(
    stored: Settings, database: Database, tmp_path: Path
) -> None:
    """What counts is the object store, where workers find it: files that only this machine lost
    are fetched, and files that only it has are shared once more."""
    objects, uploads = open_artifacts(stored), UploadStore(database)
    files = [UploadFile(name, 2, "0" * 64) for name in ("config.json", "tokenizer.json")]
    upload = uploads.announce(files, tenant="t", keep_s=60)
    folder = UploadFolder(stored, upload.id)
    folder.whole.mkdir(parents=True)
    for file in files:
        (folder.whole / file.path).write_text("{}")
    objects.share_folder(UPLOADS, upload.id, folder.whole)
    upload = uploads.finish(upload.id, keep_s=60)
    assert reopen_lost(stored, objects, uploads, upload).state == "complete"

    (folder.whole / "config.json").unlink()
    assert reopen_lost(stored, objects, uploads, upload).state == "complete"
    assert fetch_upload(stored, objects, upload.id) == folder.whole
    assert (folder.whole / "config.json").read_text() == "{}"

    objects.remove_folder(UPLOADS, upload.id)
    (tmp_path / "other.json").write_text("{}")
    objects.share_folder(UPLOADS, f"{upload.id}/deep", tmp_path)
    assert reopen_lost(stored, objects, uploads, upload).state == "open"
    assert uploads.received(upload.id) == {"config.json": [0], "tokenizer.json": [0]}
    assert objects.shared_files(UPLOADS, upload.id, folder.whole) == {}
    assert sorted(place.name for place in folder.open.iterdir()) == [f.path for f in files]


def test_stale_attempt_cannot_publish(stored: Settings, database: Database) -> None:
    leases = LeaseStore(database, lease_s=60)
    store = JobStore(database)
    store.submit(spec())
    old = leases.claim_next("w", ("cpu",))
    assert old is not None
    leases.hand_back(old.id, old.token, "test", retries=9)
    assert leases.claim_next("w2", ("cpu",)) is not None
    objects = open_artifacts(stored)
    fill(objects.attempt_folder(old.id, old.token), 10)
    files = objects.publish(old.id, old.token, lambda *_: None)
    assert not leases.finish(old.id, old.token, {}, files)
    assert store.artifacts(old.id) == ()
