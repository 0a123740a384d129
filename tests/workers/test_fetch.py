"""Model references: allowed folders, and a small Hub server on loopback."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import SecretStr

from bitmill.errors import ModelError, ResourceError
from bitmill_workers.execution.fetch import fetch_model, hub_info, local_model
from bitmill_workers.execution.stop import StopRequest
from bitmill_workers.execution.supervisor import Supervisor
from bitmill_workers.job_spec import HubModel, ModelRef, PathModel, UploadModel
from bitmill_workers.settings import Settings
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.limits import Limits
from stores import processes_of, spec

SHA = "a" * 40
FILES = {"config.json": b"{}", "model.safetensors": b"weights", "evil.py": b"boom"}


class _Hub(BaseHTTPRequestHandler):
    """The Hub's read API for org/good, org/pickle (no safetensors), org/gated, org/huge."""

    requests: list[str]
    tokens: set[str | None]

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api(parts[2:])
        elif "resolve" in parts:
            self._file(parts[-1])
        else:
            self._answer(404, b"{}")

    do_HEAD = do_GET  # noqa: N815

    def _api(self, parts: list[str]) -> None:
        name = "/".join(parts[:2])
        if name == "org/slow":
            self.server.asked.set()
            self.server.answer.wait(60)
        if name == "org/gated":
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif name not in ("org/good", "org/pickle", "org/huge", "org/slow"):
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[2:3] == ["revision"] and parts[3] not in ("main", SHA):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif parts[2:3] == ["tree"]:
            tree = [
                {"type": "file", "path": n, "size": len(b), "oid": "0" * 40}
                for n, b in FILES.items()
            ]
            self._answer(200, json.dumps(tree).encode())
        else:
            names = {"org/pickle": {"pytorch_model.bin": b""}}.get(name, FILES)
            size = 10**18 if name == "org/huge" else None
            info = {
                "id": name,
                "modelId": name,
                "sha": SHA,
                "private": False,
                "gated": False,
                "tags": [],
                "siblings": [{"rfilename": n, "size": size or len(b)} for n, b in names.items()],
            }
            self._answer(200, json.dumps(info).encode())

    def _file(self, name: str) -> None:
        if name in FILES:
            self._answer(200, FILES[name], {"X-Repo-Commit": SHA, "ETag": f'"{name}"'})
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """The Hub; `asked` is set when org/slow was asked for, which waits for `answer`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.requests, server.asked, server.answer = [], threading.Event(), threading.Event()
    server.tokens = set()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.answer.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(settings: Settings, server: ThreadingHTTPServer) -> Settings:
    """Settings whose Hub is a server of this process."""
    url = f"http://127.0.0.1:{server.server_port}"
    return settings.model_copy(update={"hub_endpoint": url})


def look_at(model: ModelRef, settings: Settings) -> None:
    """What admission asks of a model before anything is fetched."""
    if isinstance(model, HubModel):
        hub_info(model, settings, 5.0)
    else:
        local_model(model, settings)


def code_of(model: HubModel | PathModel | UploadModel, settings: Settings) -> str:
    with pytest.raises(ModelError) as caught:
        look_at(model, settings)
    return caught.value.code


def test_folder_below_a_root_is_found(settings: Settings) -> None:
    model = PathModel(path="models/tiny")
    assert local_model(model, settings) == settings.model_roots["models"].resolve() / "tiny"


@pytest.mark.parametrize(
    "path",
    [
        "/etc",
        "../models/tiny",
        "models/../../etc",
        "other/tiny",
        "models\\tiny",
        "~/x",
        "models/\0",
    ],
)
def test_path_outside_the_roots_is_refused(settings: Settings, path: str) -> None:
    assert code_of(PathModel(path=path), settings) == "path_not_allowed"


def test_symbolic_links_are_refused(settings: Settings, tmp_path: Path) -> None:
    root = settings.model_roots["models"]
    (root / "link").symlink_to(tmp_path)
    assert code_of(PathModel(path="models/link"), settings) == "path_not_allowed"
    assert code_of(PathModel(path="models/link/models/tiny"), settings) == "path_not_allowed"
    secret = tmp_path / "secret"
    secret.write_text("x")
    (root / "tiny" / "config.json").symlink_to(secret)
    assert code_of(PathModel(path="models/tiny"), settings) == "path_not_allowed"


def test_pickle_only_folder_is_refused_by_name(settings: Settings) -> None:
    folder = settings.model_roots["models"] / "old"
    folder.mkdir()
    assert code_of(PathModel(path="models/old"), settings) == "no_weights"
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin") as caught:
        local_model(PathModel(path="models/old"), settings)
    assert caught.value.code == "pickle_refused"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without rights")
def test_a_folder_that_the_service_may_not_read_is_refused(settings: Settings) -> None:
    root = settings.model_roots["models"]
    closed = root / "closed"
    (closed / "inner").mkdir(parents=True)
    for parent in root.parents:
        if parent.stat().st_uid == 0 and parent != parent.parent:
            parent.chmod(parent.stat().st_mode | 0o011)
    closed.chmod(0o700)
    os.seteuid(65534)
    try:
        assert code_of(PathModel(path="models/closed"), settings) == "path_not_allowed"
        assert code_of(PathModel(path="models/closed/inner"), settings) == "path_not_allowed"
    finally:
        os.seteuid(0)


def test_gguf_file_must_exist(settings: Settings) -> None:
    folder = settings.model_roots["models"] / "g"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(b"GGUF")
    local_model(PathModel(path="models/g", file="a.gguf"), settings)
    assert code_of(PathModel(path="models/g", file="b.gguf"), settings) == "file_not_found"
    with pytest.raises(ModelError, match=r"a\.gguf"):
        local_model(PathModel(path="models/g"), settings)


def test_uploads_are_not_available(settings: Settings) -> None:
    assert code_of(UploadModel(upload_id="u"), settings) == "upload_not_found"


@pytest.mark.parametrize(
    ("repo", "code"),
    [
        ("org/absent", "model_not_found"),
        ("org/gated", "model_gated"),
        ("org/pickle", "pickle_refused"),
    ],
)
def test_unusable_repository_is_refused_by_code(hub: Settings, repo: str, code: str) -> None:
    assert code_of(HubModel(repo_id=repo), hub) == code


def test_unknown_revision_is_refused(hub: Settings) -> None:
    assert code_of(HubModel(repo_id="org/good", revision="v9"), hub) == "revision_not_found"


def test_hub_that_is_away_refuses_the_fetch(settings: Settings) -> None:
    away = settings.model_copy(update={"hub_endpoint": "http://127.0.0.1:1", "hub_patience_s": 1.0})
    with pytest.raises(ModelError) as caught:
        fetch_model(HubModel(repo_id="org/good"), away)
    assert caught.value.code == "hub_unreachable"


def test_download_larger_than_the_disk_is_refused(hub: Settings) -> None:
    with pytest.raises(ResourceError, match="free"):
        fetch_model(HubModel(repo_id="org/huge"), hub)


def test_job_downloads_only_safe_files(hub: Settings, database: Database) -> None:
    supervisor = Supervisor(hub, database)
    job_spec = JobStore(database)
    wanted = spec(label="steps=1").model_copy(update={"model": HubModel(repo_id="org/good")})
    job = job_spec.submit(wanted).job
    with StopRequest() as stop:
        assert supervisor.run_next(stop)
    job = supervisor.store.get(job.id)
    assert (job.state, job.error_message) == ("succeeded", None)
    (snapshot,) = hub.hub_cache.glob("models--org--good/snapshots/*")
    assert sorted(p.name for p in snapshot.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("maker", "patterns", "spent"),
    [
        (None, (), True),
        ("key", ("org/*",), True),
        ("key", ("other/*",), False),
        ("revoked", ("org/*",), False),
    ],
)
def test_the_operators_token_is_spent_for_those_who_may(
    hub: Settings,
    server: ThreadingHTTPServer,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    maker: str | None,
    patterns: tuple[str, ...],
    spent: bool,
) -> None:
    monkeypatch.setenv("BITMILL_HUB_TOKEN", "hf_operator")
    operators = hub.model_copy(update={"hub_token": SecretStr("hf_operator")})
    supervisor = Supervisor(operators, database)
    limits = Limits(hub_repositories=patterns)
    _, key = supervisor.keys.create("a", scopes=["submit"], limits=limits)
    if maker == "revoked":
        supervisor.keys.revoke(key.id)
    wanted = spec().model_copy(update={"model": HubModel(repo_id="org/absent")})
    supervisor.store.submit(wanted, created_by=maker and key.id)
    with StopRequest() as stop:
        assert supervisor.run_next(stop)
    assert server.tokens == {"Bearer hf_operator" if spent else None}


def test_job_of_a_missing_repository_fails_at_once(hub: Settings, database: Database) -> None:
    supervisor = Supervisor(hub, database)
    wanted = spec().model_copy(update={"model": HubModel(repo_id="org/absent")})
    job = supervisor.store.submit(wanted).job
    with StopRequest() as stop:
        assert supervisor.run_next(stop)
    job = supervisor.store.get(job.id)
    assert (job.state, job.attempt, job.error_code) == ("failed", 1, "model_not_found")


def test_killed_downloader_is_told_as_that(
    hub: Settings, server: ThreadingHTTPServer, database: Database
) -> None:
    supervisor = Supervisor(hub.model_copy(update={"crash_retries": 0}), database)
    wanted = spec().model_copy(update={"model": HubModel(repo_id="org/slow")})
    job = supervisor.store.submit(wanted).job

    def kill_the_downloader() -> None:
        assert server.asked.wait(60)
        request = str(hub.job_folder(job.id).resolve() / "attempt-1" / "fetch.json")
        os.kill(processes_of(request)[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_the_downloader)
    killer.start()
    with StopRequest() as stop:
        assert supervisor.run_next(stop)
    killer.join()
    job = supervisor.store.get(job.id)
    assert (job.state, job.error_code, type(job.error)) == ("failed", "killed", ResourceError)
    assert "the downloader was ended by signal 9" in (job.error_message or "")
