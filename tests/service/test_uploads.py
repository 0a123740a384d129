"""Folders that clients send: parts, digests, resuming, what is refused, and jobs on them."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from bitmill.errors import ModelError
from bitmill_service.client.client import Client
from bitmill_service.client.errors import ServiceError
from bitmill_service.client.upload import announced
from bitmill_service.main import create_app
from bitmill_service.schemas import UploadRequest, UploadView
from bitmill_service.settings import ServiceSettings
from bitmill_workers.errors import QuotaExceeded, UploadNotFound
from bitmill_workers.messaging.app import Dispatcher
from bitmill_workers.messaging.reconcile import Reconciler
from bitmill_workers.storage.artifacts import ArtifactStore
from bitmill_workers.storage.uploads import UploadFolder, collect_uploads, reopen_lost
from bitmill_workers.store.migrate import upgrade
from bitmill_workers.store.tables import uploads
from bitmill_workers.store.uploads import PART_BYTES, UploadFile, UploadRecord, UploadStore
from finished import Stack, spec_json
from serving import serve
from stores import wait_for
from tiny import tiny_llama


def safetensors(size: int) -> bytes:
    """A legal file with one tensor of `size` bytes."""
    head = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + os.urandom(size)


def announce(http: httpx2.Client, files: dict[str, bytes], **changes: Any) -> httpx2.Response:
    told = [
        {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()} | changes
        for path, data in files.items()
    ]
    return http.post("/v1/uploads", json={"files": told})


def put(
    http: httpx2.Client, upload: str, path: str, data: bytes, *, part: int = 0, digest: str = ""
) -> httpx2.Response:
    sha = base64.b64encode(hashlib.sha256(data).digest()).decode()
    headers = {"Content-Digest": digest or f"sha-256=:{sha}:"}
    address = f"/v1/uploads/{upload}/files/{path}"
    return http.put(address, params={"part": part}, content=data, headers=headers)


def code(answer: httpx2.Response) -> str:
    found: str = answer.json()["code"]
    return found


@pytest.fixture
def files() -> dict[str, bytes]:
    """Two parts and a config."""
    return {"model.safetensors": safetensors(PART_BYTES), "config.json": b"{}"}


def test_a_whole_folder_is_sent_in_parts_and_checked(
    http: httpx2.Client, stack: Stack, files: dict[str, bytes]
) -> None:
    made = announce(http, files)
    assert made.status_code == 201
    view = made.json()
    assert (view["state"], view["part_size"]) == ("open", PART_BYTES)
    assert [f["parts"] for f in view["files"]] == [1, 2]
    upload, weights = view["id"], files["model.safetensors"]
    assert put(http, upload, "config.json", b"{}").status_code == 204
    assert put(http, upload, "model.safetensors", weights[PART_BYTES:], part=1).status_code == 204
    early = http.post(f"/v1/uploads/{upload}/complete")
    assert (early.status_code, code(early)) == (409, "upload_incomplete")
    assert "1 of 2 parts of model.safetensors" in early.json()["detail"]
    again = announce(http, files).json()
    assert again["id"] == upload
    assert {f["path"]: f["received"] for f in again["files"]} == {
        "config.json": [0],
        "model.safetensors": [1],
    }
    for _ in range(2):
        assert put(http, upload, "model.safetensors", weights[:PART_BYTES]).status_code == 204
    for _ in range(2):
        done = http.post(f"/v1/uploads/{upload}/complete")
        assert (done.status_code, done.json()["state"]) == (200, "complete")
    folder = stack.context.settings.uploads_folder / upload
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files
    late = put(http, upload, "config.json", b"{}")
    assert (late.status_code, code(late)) == (409, "upload_complete")
    assert upload in [u["id"] for u in http.get("/v1/uploads").json()["uploads"]]
    assert http.delete(f"/v1/uploads/{upload}").status_code == 204
    assert not folder.exists()
    assert code(http.get(f"/v1/uploads/{upload}")) == "upload_not_found"


def test_an_upload_stays_while_a_job_needs_it(
    http: httpx2.Client, client: Client, stack: Stack, files: dict[str, bytes]
) -> None:
    upload = announce(http, files).json()["id"]
    put(http, upload, "config.json", b"{}")
    folder = stack.context.settings.uploads_folder / f"{upload}.open"
    job = stack.running(model={"source": "upload", "upload_id": upload})
    with pytest.raises(ServiceError, match=f"job {job.id} needs upload {upload}") as refused:
        client.delete_upload(upload)
    assert (refused.value.status, refused.value.code) == (409, "upload_in_use")
    assert (folder / "config.json").is_file()
    assert stack.leases.fail(job.id, job.token, ModelError("no", param="model"))
    client.delete_upload(upload)
    assert not folder.exists()


def test_a_part_of_an_upload_that_is_gone_is_refused(stack: Stack) -> None:
    everything = stack.context.uploads
    upload = everything.announce([UploadFile("config.json", 2, "0" * 64)], tenant="t", keep_s=9)
    everything.delete(upload.id)
    with pytest.raises(UploadNotFound):
        everything.note_part(upload.id, "config.json", 0, keep_s=9)


def test_a_disk_that_fills_up_is_told_and_the_part_can_be_sent_again(
    tmp_path: Path, small_disk: Path, files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(ServiceSettings(data=tmp_path / "data"))
    upgrade(app.state.context.database)
    kept = tmp_path / "data" / "uploads"
    kept.symlink_to(small_disk)
    with serve(app) as url, httpx2.Client(base_url=url, timeout=60) as http:
        upload = announce(http, files).json()["id"]
        part = files["model.safetensors"][:PART_BYTES]
        answer = put(http, upload, "model.safetensors", part)
        assert (answer.status_code, code(answer)) == (507, "disk_full")
        assert "disk" in answer.json()["hint"]
        assert not [record for record in caplog.records if record.exc_info]
        assert not list(small_disk.rglob(".part-*"))
        kept.unlink()
        assert put(http, upload, "model.safetensors", part).status_code == 204


def sent(http: httpx2.Client, stack: Stack) -> UploadRecord:
    """An upload whose parts have come."""
    data = safetensors(99)
    record = stack.context.uploads.get(announce(http, {"model.safetensors": data}).json()["id"])
    assert put(http, record.id, "model.safetensors", data).status_code == 204
    return record


def test_a_completion_that_was_cut_off_can_be_asked_for_again(
    http: httpx2.Client, stack: Stack
) -> None:
    record = sent(http, stack)
    folder = UploadFolder(stack.context.settings, record.id)
    assert folder.damaged(record) == ()
    folder.finish()
    folder.finish()
    done = http.post(f"/v1/uploads/{record.id}/complete")
    assert (done.status_code, done.json()["state"]) == (200, "complete")


class Sharing:
    """An artifact store beside which something else happens."""

    def __init__(self, store: ArtifactStore, beside: Callable[[], object]) -> None:
        self._store, self._beside = store, beside

    def share_folder(self, kind: str, name: str, folder: Path) -> None:
        self._beside()
        self._store.share_folder(kind, name, folder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_an_upload_that_is_deleted_while_it_is_completed_leaves_nothing(
    http: httpx2.Client, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, context = sent(http, stack), stack.context
    folder = UploadFolder(context.settings, record.id)
    delete = partial(context.uploads.delete, record.id)
    monkeypatch.setattr(context, "artifacts", Sharing(context.artifacts, delete))
    answer = http.post(f"/v1/uploads/{record.id}/complete")
    assert (answer.status_code, code(answer)) == (404, "upload_not_found")
    assert not folder.whole.exists()


def test_an_upload_can_be_completed_twice_at_once(
    http: httpx2.Client, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, context = sent(http, stack), stack.context
    address = f"/v1/uploads/{record.id}/complete"
    plain, others = context.artifacts, list[httpx2.Response]()

    def again() -> None:
        monkeypatch.setattr(context, "artifacts", plain)
        others.append(http.post(address))

    monkeypatch.setattr(context, "artifacts", Sharing(plain, again))
    answers = [http.post(address), *others]
    assert [answer.status_code for answer in answers] == [200, 200]


def test_a_part_that_stops_leaves_no_stack_trace_and_no_file(
    http: httpx2.Client, stack: Stack, caplog: pytest.LogCaptureFixture
) -> None:
    upload = announce(http, {"model.safetensors": safetensors(5000)}).json()["id"]
    address = http.base_url
    head = (
        f"PUT /v1/uploads/{upload}/files/model.safetensors?part=0 HTTP/1.1\r\n"
        f"Host: {address.host}\r\nContent-Digest: sha-256=:{'A' * 43}=:\r\n"
        "Content-Length: 5000\r\n\r\n"
    )
    counted = re.compile(r'request_seconds_count\{method="PUT",route="[^"]*",status="400"\} (\d+)')
    with caplog.at_level(logging.WARNING):
        with socket.create_connection((address.host, address.port)) as link:
            link.sendall(head.encode() + b"x" * 1000)
        wait_for(lambda: counted.search(http.get("/metrics").text), "the end of the request", 20)
    assert [record.getMessage() for record in caplog.records] == []
    left = stack.context.settings.uploads_folder.rglob("*")
    assert [path for path in left if path.name.startswith(".part-")] == []


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("../config.json", "file_refused"),
        ("/etc/passwd.json", "file_refused"),
        ("a/b.json", "file_refused"),
        ("..json", "file_refused"),
        ("additional_chat_templates/../../x.jinja", "file_refused"),
        ("licenses/../x.txt", "file_refused"),
        ("modeling.py", "file_refused"),
        ("weights.zip", "file_refused"),
        ("pytorch_model.bin", "file_refused"),
        ("a\\b.json", "file_refused"),
        ("a\0.json", "file_refused"),
        ("a\n.json", "file_refused"),
        ("ö.json", "file_refused"),
        (".hidden.json", "file_refused"),
        ("x" * 300 + ".json", "file_refused"),
        ("MODEL.safetensors", "file_refused"),
    ],
)
def test_files_that_no_model_needs_are_refused(http: httpx2.Client, path: str, wanted: str) -> None:
    answer = announce(http, {"model.safetensors": b"x", path: b"x"})
    assert (answer.status_code, code(answer)) == (422, wanted)


def test_a_folder_of_pickles_is_refused_by_name(http: httpx2.Client) -> None:
    answer = announce(http, {"pytorch_model.bin": b"x", "config.json": b"{}"})
    assert (answer.status_code, code(answer)) == (422, "pickle_refused")


@pytest.mark.parametrize(
    "changes",
    [{"size": -1}, {"size": 2**60}, {"sha256": "0"}, {"sha256": "G" * 64}, {"path": ""}],
)
def test_announcements_that_break_a_rule_are_refused(
    http: httpx2.Client, changes: dict[str, Any]
) -> None:
    assert announce(http, {"model.safetensors": b"x"}, **changes).status_code == 422


def test_more_than_the_disk_holds_is_refused(http: httpx2.Client) -> None:
    answer = announce(http, {"model.safetensors": b"x"}, size=2**49)
    assert (answer.status_code, code(answer)) == (507, "disk_full")


def test_only_what_has_not_come_has_to_fit_on_the_disk(
    small_disk: Path, files: dict[str, bytes]
) -> None:
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    app = create_app(ServiceSettings(data=small_disk))
    upgrade(app.state.context.database)
    weights, filler = files["model.safetensors"], small_disk / "filler"

    def fill() -> None:
        filler.unlink(missing_ok=True)
        filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - (4 << 20)))

    with serve(app) as url, httpx2.Client(base_url=url, timeout=60) as http:
        upload = announce(http, files).json()["id"]
        assert put(http, upload, "model.safetensors", weights[:PART_BYTES]).status_code == 204
        fill()
        others = announce(http, {"model.safetensors": weights})
        assert (others.status_code, code(others)) == (507, "disk_full")
        assert [one["id"] for one in http.get("/v1/uploads").json()["uploads"]] == [upload]
        assert announce(http, files).json()["id"] == upload
        assert put(http, upload, "config.json", b"{}").status_code == 204
        rest = put(http, upload, "model.safetensors", weights[PART_BYTES:], part=1)
        assert rest.status_code == 204
        for state in ("open", "complete"):
            told = announce(http, files)
            assert (told.status_code, told.json()["state"]) == (201, state)
            assert http.post(f"/v1/uploads/{upload}/complete").status_code == 200
        (small_disk / "uploads" / upload / "model.safetensors").unlink()
        fill()
        lost = announce(http, files)
        assert (lost.status_code, code(lost)) == (507, "disk_full")
        assert lost.json()["detail"].startswith(f"{len(weights):,} bytes of the upload are to come")
        filler.unlink()
        assert announce(http, files).json()["state"] == "open"


def test_parts_that_are_not_what_they_say_are_refused_and_change_nothing(
    http: httpx2.Client, files: dict[str, bytes]
) -> None:
    upload = announce(http, files).json()["id"]
    right = files["model.safetensors"][:PART_BYTES]
    wrong = bytes(PART_BYTES)
    sha = base64.b64encode(hashlib.sha256(right).digest()).decode()
    name = "model.safetensors"
    assert put(http, upload, name, right).status_code == 204
    for answer, wanted in (
        (put(http, upload, name, wrong, digest=f"sha-256=:{sha}:"), "digest_mismatch"),
        (put(http, upload, name, right[:-1]), "bad_part"),
        (put(http, upload, name, right + b"x"), "bad_part"),
        (put(http, upload, name, b"x", part=2), "bad_part"),
        (put(http, upload, name, right, digest="md5=:x:"), "bad_part"),
        (put(http, upload, "other.json", b"{}"), "file_refused"),
        (put(http, upload, "../config.json", b"{}"), "not_found"),
        (put(http, "none", name, right), "upload_not_found"),
    ):
        assert answer.status_code in (404, 422), answer.text
        assert code(answer) == wanted
    put(http, upload, name, files[name][PART_BYTES:], part=1)
    put(http, upload, "config.json", b"{}")
    assert http.post(f"/v1/uploads/{upload}/complete").status_code == 200


@pytest.mark.parametrize(
    ("name", "data", "wanted"),
    [
        ("model.safetensors", b"\xff" * 100, "bad_safetensors"),
        ("model.safetensors", b"", "bad_safetensors"),
        ("model.safetensors", safetensors(10)[:-1], "bad_safetensors"),
        ("config.json", b"{", "invalid_model"),
        ("config.json", b"[" * 100_000, "invalid_model"),
        ("m.gguf", b"GGUF" + b"\xff" * 50, None),
    ],
    ids=["huge header", "empty", "cut", "cut JSON", "deep JSON", "GGUF"],
)
def test_damaged_files_are_refused_before_a_job_can_name_them(
    http: httpx2.Client, name: str, data: bytes, wanted: str | None
) -> None:
    sent = {"model.safetensors": safetensors(4), name: data}
    upload = announce(http, sent).json()["id"]
    for path, content in sent.items():
        if content:
            assert put(http, upload, path, content).status_code == 204
    answer = http.post(f"/v1/uploads/{upload}/complete")
    assert answer.status_code == 422, answer.text
    assert wanted is None or code(answer) == wanted
    model = {"source": "upload", "upload_id": upload}
    refused = http.post("/v1/jobs", json=spec_json(model=model))
    assert (refused.status_code, code(refused)) == (422, "upload_not_found")
    assert refused.json()["param"] == "model.upload_id"


def test_the_client_sends_a_model_and_a_job_is_planned_on_it(
    client: Client, stack: Stack, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "tiny")
    (folder / "README.md").write_text("stays here")
    (folder / "modeling.py").write_text("stays here, too")
    sizes: list[int] = []
    got = 0

    def count(more: int) -> None:
        nonlocal got
        got += more

    upload = client.upload(folder, on_start=sizes.append, on_bytes=count)
    assert upload.state == "complete"
    assert sizes == [upload.size] == [got]
    assert {f.path for f in upload.files} & {"README.md", "modeling.py"} == set()
    job = client.submit(spec_json(model={"source": "upload", "upload_id": upload.id}))
    assert job.state == "queued"
    assert client.upload(folder).id == upload.id
    with stack.context.database.write() as conn:
        conn.execute(sa.update(uploads).values(expires_at=0.0))
    dispatcher = Dispatcher(stack.context.settings, lambda ids: None)
    try:
        reconciler = Reconciler(stack.context.settings, stack.context.database, dispatcher)
        reconciler.collect_garbage()
        assert client.uploads()[0].id == upload.id  # an unfinished job names it
        client.cancel(job.id)
        reconciler.collect_garbage()
    finally:
        dispatcher.close()
    assert client.uploads() == []
    assert list(stack.context.settings.uploads_folder.iterdir()) == []


def test_a_broken_upload_goes_on_where_it_was(
    client: Client, tmp_path: Path, files: dict[str, bytes]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    _, request = announced(folder)
    seen: list[int] = []
    lock = threading.Lock()

    def interrupt(count: int) -> None:
        with lock:
            seen.append(count)
            if len(seen) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.upload(folder, on_bytes=interrupt)
    (begun,) = (u for u in client.uploads() if u.size == sum(map(len, files.values())))
    assert begun.state == "open"
    assert client.upload(folder).state == "complete"
    assert len(request.files) == 2
    client.delete_upload(begun.id)


def test_what_is_sent_may_not_change_on_the_way(
    http: httpx2.Client, stack: Stack, files: dict[str, bytes]
) -> None:
    """Right parts whose whole is not the announced file: the whole is compared as well."""
    told = [
        {"path": path, "size": len(data), "sha256": hashlib.sha256(b"other" + data).hexdigest()}
        for path, data in files.items()
    ]
    upload = http.post("/v1/uploads", json={"files": told}).json()["id"]
    put(http, upload, "config.json", b"{}")
    for part in (0, 1):
        data = files["model.safetensors"][part * PART_BYTES :][:PART_BYTES]
        assert put(http, upload, "model.safetensors", data, part=part).status_code == 204
    answer = http.post(f"/v1/uploads/{upload}/complete")
    assert (answer.status_code, code(answer)) == (422, "digest_mismatch")
    assert answer.json()["param"] in files


@pytest.mark.parametrize("damage", ["other bytes", "cut", "gone"])
def test_what_was_damaged_after_it_had_come_is_sent_again(
    client: Client, stack: Stack, tmp_path: Path, files: dict[str, bytes], damage: str
) -> None:
    """A server that lost power, or a file that changed while it was read: the next call mends it,
    although the same files are the same upload."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    wanted = {file.sha256 for file in announced(folder)[1].files}

    def upload() -> UploadView:
        (found,) = (u for u in client.uploads() if {file.sha256 for file in u.files} == wanted)
        return found

    def spoil(count: int) -> None:
        """The weights are damaged as soon as all is there."""
        begun = upload()
        came = stack.context.uploads.received(begun.id)
        if all(len(came[file.path]) == file.parts for file in begun.files):
            place = UploadFolder(stack.context.settings, begun.id).open / "model.safetensors"
            if damage == "gone":
                place.unlink(missing_ok=True)
            else:
                place.write_bytes(b"x" * (place.stat().st_size if damage == "other bytes" else 9))

    with pytest.raises(ServiceError, match=r"model\.safetensors.*send its parts again") as refused:
        client.upload(folder, on_bytes=spoil)
    assert refused.value.code == "digest_mismatch"
    begun = upload()
    assert stack.context.uploads.received(begun.id) == {"config.json": [0]}
    done = client.upload(folder)
    assert (done.id, done.state) == (begun.id, "complete")
    client.delete_upload(done.id)


def folder_of(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("lost", ["all", "one", "cut"])
def test_what_was_lost_after_it_was_complete_is_sent_again(
    client: Client, stack: Stack, tmp_path: Path, files: dict[str, bytes], lost: str
) -> None:
    """A data folder that was restored without uploads, or damaged: the next call mends it, sends
    only what is not there, and the jobs that wait for the upload find it."""
    model = folder_of(files, tmp_path / "model")
    done = client.upload(model)
    whole = UploadFolder(stack.context.settings, done.id).whole
    job = stack.queued(model={"source": "upload", "upload_id": done.id})
    if lost == "all":
        shutil.rmtree(whole)
    elif lost == "one":
        (whole / "model.safetensors").unlink()
    else:
        os.truncate(whole / "model.safetensors", 9)
    _, request = announced(model)
    again = announce_request(client, request)
    assert (again.id, again.state) == (done.id, "open")
    assert {file.path: len(file.received) for file in again.files} == {
        "config.json": 0 if lost == "all" else 1,
        "model.safetensors": 0,
    }
    mended = client.upload(model)
    assert (mended.id, mended.state) == (done.id, "complete")
    assert {place.name: place.read_bytes() for place in whole.iterdir()} == files
    assert announce_request(client, request).state == "complete"
    client.cancel(job.id)
    client.delete_upload(done.id)


def announce_request(client: Client, request: UploadRequest) -> UploadView:
    with httpx2.Client(base_url=client.url) as http:
        answer = http.post("/v1/uploads", json=request.model_dump(mode="json"))
    assert answer.status_code == 201, answer.text
    return UploadView.model_validate_json(answer.content)


def test_a_loss_that_another_call_has_mended_reopens_nothing(
    client: Client, stack: Stack, tmp_path: Path, files: dict[str, bytes]
) -> None:
    """Two replicas are told of the same files; the slow one comes when the other has them all."""
    model, context = folder_of(files, tmp_path / "model"), stack.context
    done = client.upload(model)
    folder = UploadFolder(context.settings, done.id)
    found = context.uploads.get(done.id)
    shutil.rmtree(folder.whole)

    class Slow(UploadStore):
        def reopen(self, *given: Any) -> UploadRecord:
            client.upload(model)
            return super().reopen(*given)

    slow = Slow(context.database)
    assert reopen_lost(context.settings, context.artifacts, slow, found).state == "complete"
    assert {place.name: place.read_bytes() for place in folder.whole.iterdir()} == files
    client.delete_upload(done.id)


def test_an_upload_that_is_announced_again_does_not_expire_before_a_job_can_name_it(
    stack: Stack,
) -> None:
    store, files = stack.context.uploads, [UploadFile("config.json", 2, "d" * 64)]
    first = store.announce(files, tenant="t", keep_s=1)
    again = store.announce(files, tenant="t", keep_s=600)
    assert again.id == first.id
    assert again.expires_at > first.expires_at + 500
    assert store.announce(files, tenant="t", keep_s=1).expires_at == again.expires_at
    store.delete(first.id)


class Busy(UploadStore):
    """A store whose clients announce and send while it is read."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack.context.database)
        self.settings = stack.context.settings
        self.begun: list[UploadFolder] = []

    def list(self, *, tenant: str | None = None) -> tuple[UploadRecord, ...]:
        found = super().list(tenant=tenant)
        new = self.announce([UploadFile("config.json", 2, "c" * 64)], tenant="t", keep_s=60)
        self.begun.append(UploadFolder(self.settings, new.id))
        self.begun[-1].scratch()
        return found


def test_an_upload_that_begins_while_garbage_is_collected_stays(stack: Stack) -> None:
    left = stack.context.settings.uploads_folder / "01a22b16-2af8-7915-8dbc-340e5e5ee464"
    left.mkdir(parents=True)
    store = Busy(stack)
    assert collect_uploads(stack.context.settings, store) == 1
    assert not left.exists()
    assert [folder.open.is_dir() for folder in store.begun] == [True]
    store.delete(store.begun[0].whole.name)


def test_command_line_uploads_what_the_service_cannot_see(
    command: Callable[..., tuple[int, str, str]], stack: Stack, tmp_path: Path
) -> None:
    tiny_llama(tmp_path / "mine", seed=3)
    words = ("--code-bits", "3", "--method", "uniform", "--order", "natural", "--url", stack.url)
    status, out, err = command("submit", f"{tmp_path}/mine", *words)
    assert status == 0, err
    upload, job = (line.split()[1] for line in out.splitlines()[:2])
    assert stack.context.jobs.get(job).spec["model"]["upload_id"] == upload.rstrip(":")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert command("submit", str(empty), *words)[0] == 2
    assert command("submit", f"{tmp_path}/absent", *words)[0] == 2


def test_tenants_do_not_share_uploads_nor_exceed_their_bytes(stack: Stack) -> None:
    store = stack.context.uploads
    one = [UploadFile("model.safetensors", 600, "a" * 64)]
    mine = store.announce(one, tenant="alice", keep_s=60, most_bytes=1000)
    theirs = store.announce(one, tenant="bob", keep_s=60)
    assert mine.id != theirs.id
    with pytest.raises(UploadNotFound):
        store.get(mine.id, tenant="bob")
    two = [UploadFile("model.safetensors", 600, "b" * 64)]
    with pytest.raises(QuotaExceeded, match="keeps 600 bytes"):
        store.announce(two, tenant="alice", keep_s=60, most_bytes=1000)
    assert store.announce(one, tenant="alice", keep_s=60, most_bytes=1000).id == mine.id
    for upload in (mine, theirs):
        store.delete(upload.id)
    with pytest.raises(ServiceError), Client(stack.url) as client:
        client.delete_upload(mine.id)
