"""Downloads that break, lie or change, against a real server that does so on purpose."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from bitmill.errors import VerificationError
from bitmill_service.api.files import StoredFile, file_response
from bitmill_service.client.download import Download, download_files, safe_target, select
from bitmill_service.client.errors import ServiceError
from bitmill_service.schemas import FileView
from serving import serve


class Unreliable:
    """Serves files from a folder; `cuts` breaks the next answers after so many bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.seen: list[tuple[str, str | None, str | None]] = []
        self.app = FastAPI()
        self.app.get("/files/{path:path}")(self.read)

    def read(self, path: str, request: Request) -> Response:
        headers = request.headers
        self.seen.append((path, headers.get("range"), headers.get("if-range")))
        if self.statuses:
            return Response(status_code=self.statuses.pop(0), headers={"Retry-After": "0"})
        file = self.folder / path
        data = file.read_bytes()
        stored = StoredFile(file, path, len(data), hashlib.sha256(data).hexdigest())
        answer = file_response(stored, "GET", headers)
        return Cut(answer, self.cuts.pop(0)) if self.cuts else answer

    def add(self, path: str, data: bytes) -> FileView:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        return FileView(path=path, size=len(data), sha256=digest, url=f"/files/{path}")


class Cut(StreamingResponse):
    """The headers of another answer, and only the first bytes of its body."""

    def __init__(self, whole: StreamingResponse, count: int) -> None:
        super().__init__(self._first(whole.body_iterator, count), whole.status_code)
        self.raw_headers = whole.raw_headers

    @staticmethod
    async def _first(chunks: AsyncGenerator[bytes], count: int) -> AsyncIterator[bytes]:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk[:count]
                raise ConnectionError("cut on purpose")


@pytest.fixture
def server(tmp_path: Path) -> Unreliable:
    return Unreliable(tmp_path / "served")


@pytest.fixture
def http(server: Unreliable) -> Iterator[httpx2.Client]:
    with serve(server.app) as url, httpx2.Client(base_url=url) as client:
        yield client


def fetch(http: httpx2.Client, files: list[FileView], folder: Path) -> Download:
    return download_files(
        http, files, folder, parallel=2, on_bytes=lambda _: None, sleep=lambda _: None
    )


def test_files_arrive_whole_and_a_second_run_fetches_nothing(
    server: Unreliable, http: httpx2.Client, tmp_path: Path
) -> None:
    files = [server.add("config.json", b"{}"), server.add("sub/model.bin", b"abc" * 9000)]
    first = fetch(http, files, tmp_path / "out")
    assert sorted(first.fetched) == ["config.json", "sub/model.bin"]
    assert first.bytes_fetched == 2 + 27000
    assert (tmp_path / "out/sub/model.bin").read_bytes() == b"abc" * 9000
    second = fetch(http, files, tmp_path / "out")
    assert (second.fetched, second.bytes_fetched) == ((), 0)
    assert sorted(second.skipped) == ["config.json", "sub/model.bin"]


def test_broken_connection_is_continued_where_it_broke(
    server: Unreliable, http: httpx2.Client, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 400
    file = server.add("model.bin", data)
    server.cuts = [30_000, 20_000]
    done = fetch(http, [file], tmp_path / "out")
    assert (tmp_path / "out/model.bin").read_bytes() == data
    assert [r for _, r, _ in server.seen] == [None, "bytes=30000-", "bytes=50000-"]
    assert {i for _, _, i in server.seen} == {f'"{file.sha256}"'}
    assert done.bytes_fetched == len(data)


def test_another_run_continues_the_part_of_the_first(
    server: Unreliable, http: httpx2.Client, tmp_path: Path
) -> None:
    file = server.add("model.bin", b"x" * 50_000)
    server.cuts = [10_000] + [0] * 5
    with pytest.raises(httpx2.TransportError):
        fetch(http, [file], tmp_path / "out")
    assert not (tmp_path / "out/model.bin").exists()
    done = fetch(http, [file], tmp_path / "out")
    assert done.bytes_fetched == 40_000
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.bin"]


def test_part_with_wrong_bytes_is_thrown_away(
    server: Unreliable, http: httpx2.Client, tmp_path: Path
) -> None:
    file = server.add("model.bin", b"right" * 1000)
    out = tmp_path / "out"
    out.mkdir()
    (out / f".model.bin.{file.sha256[:12]}.part").write_bytes(b"wrong" * 500)
    fetch(http, [file], out)
    assert (out / "model.bin").read_bytes() == b"right" * 1000


def test_changed_file_is_fetched_again(
    server: Unreliable, http: httpx2.Client, tmp_path: Path
) -> None:
    file = server.add("model.bin", b"new" * 100)
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.bin").write_bytes(b"old" * 100)
    assert fetch(http, [file], out).fetched == ("model.bin",)
    assert (out / "model.bin").read_bytes() == b"new" * 100


def test_bytes_that_never_match_the_manifest_are_refused(
    server: Unreliable, http: httpx2.Client, tmp_path: Path
) -> None:
    file = server.add("model.bin", b"bad" * 100).model_copy(update={"sha256": "0" * 64})
    with pytest.raises(VerificationError, match=r"model\.bin"):
        fetch(http, [file], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_busy_server_is_asked_again(
    server: Unreliable, http: httpx2.Client, tmp_path: Path
) -> None:
    file = server.add("model.bin", b"x")
    server.statuses = [503, 429, 502]
    assert fetch(http, [file], tmp_path / "out").fetched == ("model.bin",)
    assert len(server.seen) == 4


def test_refusal_is_raised_at_once(server: Unreliable, http: httpx2.Client, tmp_path: Path) -> None:
    file = server.add("model.bin", b"x")
    server.statuses = [404]
    with pytest.raises(ServiceError) as refused:
        fetch(http, [file], tmp_path / "out")
    assert refused.value.status == 404
    assert len(server.seen) == 1


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../b", "a\\b", "", "a\0b"])
def test_manifest_cannot_name_files_outside_the_folder(tmp_path: Path, path: str) -> None:
    with pytest.raises(VerificationError):
        safe_target(tmp_path, path)


def test_select_keeps_files_that_match_any_pattern(server: Unreliable) -> None:
    files = [server.add(name, b"") for name in ("a.json", "b.safetensors", "sub/c.json")]
    assert [f.path for f in select(files, ())] == ["a.json", "b.safetensors", "sub/c.json"]
    assert [f.path for f in select(files, ("*.json",))] == ["a.json", "sub/c.json"]
    assert [f.path for f in select(files, ("b.*", "a*"))] == ["a.json", "b.safetensors"]
