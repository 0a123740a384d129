"""Downloads that break, lie or change, against a real server that does so on purpose."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from bitmill.errors import InputError, VerificationError
from bitmill.io.atomic import sha256_file
from bitmill.io.manifest import write_manifest
from bitmill_service.api.files import StoredFile, file_response
from bitmill_service.client.download import (
    Download,
    check_free,
    download_files,
    safe_target,
    select,
)
from bitmill_service.client.errors import ServiceError, Unreachable
from bitmill_service.client.retries import Retries
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
        return Cut(answer, data, self.cuts.pop(0)) if self.cuts else answer

    def add(self, path: str, data: bytes) -> FileView:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        return FileView(path=path, size=len(data), sha256=digest, url=f"/files/{path}")


class Cut(StreamingResponse):
    """The headers of another answer, and only the first bytes of its body."""

    def __init__(self, whole: Response, data: bytes, count: int) -> None:
        span = whole.headers.get("content-range", "bytes 0-")
        start = int(span.removeprefix("bytes ").partition("-")[0])
        super().__init__(self._first(data[start : start + count]), whole.status_code)
        self.raw_headers = whole.raw_headers

    @staticmethod
    async def _first(data: bytes) -> AsyncIterator[bytes]:
        yield data
        raise ConnectionError("cut on purpose")


@pytest.fixture
def server(tmp_path: Path) -> Unreliable:
    return Unreliable(tmp_path / "served")


@pytest.fixture
def http(server: Unreliable) -> Iterator[httpx2.Client]:
    with serve(server.app) as url, httpx2.Client(base_url=url) as client:
        yield client


def fetch(http: httpx2.Client, files: list[FileView], folder: Path) -> Download:
    retries = Retries(tries=3, patience=20.0, sleep=lambda _: None)
    return download_files(http, files, folder, parallel=2, on_bytes=lambda _: None, retries=retries)


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
    server.cuts = [10_000] + [0] * 50
    with pytest.raises(Unreachable, match=r"model\.bin.*download again"):
        fetch(http, [file], tmp_path / "out")
    server.cuts.clear()
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


def test_changed_file_of_an_earlier_result_is_fetched_again(
    server: Unreliable, http: httpx2.Client, tmp_path: Path
) -> None:
    file = server.add("sub/model.bin", b"new" * 100)
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "sub/model.bin").write_bytes(b"old" * 100)
    write_manifest(out)
    assert fetch(http, [file], out).fetched == ("sub/model.bin",)
    assert (out / "sub/model.bin").read_bytes() == b"new" * 100


@pytest.mark.parametrize("beside", ["nothing", "a result without it", "no manifest of ours"])
def test_a_file_of_the_users_is_never_replaced(
    server: Unreliable, http: httpx2.Client, tmp_path: Path, beside: str
) -> None:
    files = [server.add("a.bin", b"a"), server.add("sub/config.json", b"{}")]
    out = tmp_path / "out"
    out.mkdir()
    if beside == "a result without it":
        write_manifest(out)
    elif beside == "no manifest of ours":
        (out / "MANIFEST.json").write_text("sub/config.json")
    (out / "sub").mkdir()
    (out / "sub/config.json").write_text("mine")
    with pytest.raises(InputError, match=r"config\.json is not replaced.*another folder") as error:
        fetch(http, files, out)
    assert error.value.code == "output_exists"
    assert (out / "sub/config.json").read_text() == "mine"
    assert not (out / "a.bin").exists()


def test_a_broken_download_is_gone_on_with_by_its_manifest(
    server: Unreliable, http: httpx2.Client, tmp_path: Path
) -> None:
    files = [server.add("config.json", b"{}"), server.add("model.safetensors", b"x" * 9000)]
    write_manifest(server.folder)
    manifest = server.add("MANIFEST.json", (server.folder / "MANIFEST.json").read_bytes())
    out = tmp_path / "out"
    server.cuts = [len((server.folder / "MANIFEST.json").read_bytes())] + [0] * 50
    with pytest.raises(Unreachable):
        fetch(http, [*files, manifest], out)
    assert [place.name for place in out.iterdir()] == ["MANIFEST.json"]
    (out / "config.json").write_text("older")
    check_free(out)
    server.cuts.clear()
    assert len(fetch(http, [*files, manifest], out).fetched) == 2


NAMES = ["config.json", "MANIFEST.json", "weights.safetensors", "model.gguf", "tokenizer.json"]
NAMES += ["LICENSE", "additional_chat_templates/tools.jinja"]


@pytest.mark.parametrize("path", NAMES)
def test_a_file_in_the_way_of_a_result_is_named_before_there_is_one(
    tmp_path: Path, path: str
) -> None:
    place = tmp_path / path
    place.parent.mkdir(exist_ok=True)
    place.write_text("mine")
    with pytest.raises(InputError, match=r"is not replaced.*another folder") as error:
        check_free(tmp_path)
    assert (error.value.code, error.value.param) == ("output_exists", str(place))
    place.unlink()
    place.mkdir()
    with pytest.raises(InputError, match="a folder, and a file has to be there") as error:
        check_free(tmp_path)
    assert error.value.code == "path_in_the_way"


def test_a_folder_of_other_things_and_of_an_earlier_result_is_free(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "config.json").write_text("mine")
    check_free(tmp_path)
    check_free(tmp_path / "absent")


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
    with pytest.raises(
        InputError, match=r"no file matches '\*\.jsn': there are a\.json, b\."
    ) as no:
        select(files, ("a*", "*.jsn"))
    assert no.value.code == "no_such_file"


class Store:
    """An object store: its own entity tags, presigned addresses that expire, no `If-Range`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.statuses: list[int] = []
        self.cuts: list[int] = []
        self.seen: list[dict[str, str]] = []
        self.app = FastAPI()
        self.app.get("/bucket/{path:path}")(self.read)

    def read(self, path: str, request: Request) -> Response:
        self.seen.append(dict(request.headers))
        if request.query_params.get("Signature") != "valid":
            return Response("<Error>AccessDenied</Error>", 403)
        if self.statuses:
            return Response("<Error/>", self.statuses.pop(0))
        data = (self.folder / path).read_bytes()
        etag = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if request.headers.get("if-range", f'"{etag}"') != f'"{etag}"':
            return Response(data, 200)
        start, status = 0, 200
        if asked := request.headers.get("range"):
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
        headers = {"ETag": f'"{etag}"', "Content-Length": str(len(data) - start)}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start : start + self.cuts.pop(0)] if self.cuts else data[start:]

        async def chunks() -> AsyncIterator[bytes]:
            yield body
            if len(body) < len(data) - start:
                raise ConnectionError("cut on purpose")

        return StreamingResponse(chunks(), status, headers)


@pytest.fixture
def redirected(server: Unreliable) -> Iterator[tuple[httpx2.Client, Store]]:
    """A service that sends downloads to a store, and a client with credentials for the service."""
    store = Store(server.folder)
    front = FastAPI()
    with serve(store.app) as place:

        @front.get("/files/{path:path}")
        def go(path: str, request: Request) -> Response:
            headers = request.headers
            server.seen.append((path, headers.get("range"), headers.get("if-range")))
            assert headers["authorization"] == "Bearer secret"
            signature = "old" if server.statuses and server.statuses.pop() else "valid"
            where = f"{place}/bucket/{path}?Signature={signature}"
            return Response(status_code=302, headers={"Location": where})

        headers = {"Authorization": "Bearer secret", "Cookie": "session=secret"}
        with serve(front) as url, httpx2.Client(base_url=url, headers=headers) as client:
            yield client, store


def test_a_redirect_to_the_store_is_followed_without_credentials(
    server: Unreliable, redirected: tuple[httpx2.Client, Store], tmp_path: Path
) -> None:
    http, store = redirected
    data = bytes(range(256)) * 400
    files = [server.add("config.json", b"{}"), server.add("sub/model.bin", data)]
    assert len(fetch(http, files, tmp_path / "out").fetched) == 2
    assert (tmp_path / "out/sub/model.bin").read_bytes() == data
    assert len(store.seen) == 2
    for headers in store.seen:
        assert "secret" not in str(headers)
        assert "if-range" not in headers
    assert {if_range for _, _, if_range in server.seen} == {f'"{f.sha256}"' for f in files}


def test_a_download_from_the_store_goes_on_where_it_broke(
    server: Unreliable, redirected: tuple[httpx2.Client, Store], tmp_path: Path
) -> None:
    http, store = redirected
    data = bytes(range(256)) * 400
    file = server.add("model.bin", data)
    store.cuts = [30_000, 20_000]
    done = fetch(http, [file], tmp_path / "out")
    assert [headers.get("range") for headers in store.seen] == [
        None,
        "bytes=30000-",
        "bytes=50000-",
    ]
    assert done.bytes_fetched == len(data)
    assert (tmp_path / "out/model.bin").read_bytes() == data


def test_an_expired_address_is_asked_for_again(
    server: Unreliable, redirected: tuple[httpx2.Client, Store], tmp_path: Path
) -> None:
    http, store = redirected
    file = server.add("model.bin", b"x" * 1000)
    server.statuses = [1, 1]
    store.statuses = [503, 500 + 4]
    assert fetch(http, [file], tmp_path / "out").fetched == ("model.bin",)
    assert len(store.seen) == 5


@pytest.mark.parametrize(("old", "statuses", "code"), [(99, [], 403), (0, [404] * 9, 404)])
def test_a_store_that_refuses_is_told_without_the_signed_address(
    server: Unreliable,
    redirected: tuple[httpx2.Client, Store],
    tmp_path: Path,
    old: int,
    statuses: list[int],
    code: int,
) -> None:
    http, store = redirected
    file = server.add("model.bin", b"x" * 1000)
    server.statuses, store.statuses = [1] * old, statuses
    with pytest.raises(ServiceError, match=r"model\.bin: the object store") as refused:
        fetch(http, [file], tmp_path / "out")
    assert refused.value.status == code
    assert "Signature" not in refused.value.message
    assert list((tmp_path / "out").iterdir()) == []


def test_many_downloads_into_one_folder_at_once(
    server: Unreliable, http: httpx2.Client, tmp_path: Path
) -> None:
    files = [server.add(f"{n}.bin", bytes([n]) * 300_000) for n in range(4)]
    server.cuts = [100_000] * 3
    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(fetch, http, files, tmp_path / "out") for _ in range(5)]
        done = [one.result() for one in running]
    for file in files:
        assert sha256_file(tmp_path / "out" / file.path) == file.sha256
    assert sum(one.bytes_fetched for one in done) == 4 * 300_000
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f.path for f in files]


def test_a_download_that_dies_leaves_its_part_to_the_one_that_waits(
    server: Unreliable, http: httpx2.Client, tmp_path: Path
) -> None:
    file = server.add("model.bin", b"abcd" * 1000)
    out = tmp_path / "out"
    out.mkdir()
    part = out / f".model.bin.{file.sha256[:12]}.part"
    part.write_bytes(b"abcd" * 250)
    holder = part.open("rb")
    fcntl.flock(holder, fcntl.LOCK_EX)
    told: list[str] = []

    def wait(seconds: float) -> None:
        assert server.seen == []
        holder.close()

    retries = Retries(sleep=wait, on_wait=told.append)
    done = download_files(http, [file], out, parallel=1, on_bytes=lambda _: None, retries=retries)
    assert told == ["another download fetches model.bin; waiting"]
    assert done.bytes_fetched == 3000
    assert (out / "model.bin").read_bytes() == b"abcd" * 1000


def folder_named_as_file(out: Path) -> None:
    (out / "sub/model.bin/inside").mkdir(parents=True)


def file_named_as_folder(out: Path) -> None:
    out.mkdir()
    (out / "sub").write_text("mine")


def file_named_as_target(out: Path) -> None:
    out.write_text("mine")


def file_above_target(out: Path) -> None:
    out.parent.rmdir()
    out.parent.write_text("mine")


def pipe_named_as_file(out: Path) -> None:
    (out / "sub").mkdir(parents=True)
    os.mkfifo(out / "sub/model.bin")


@pytest.mark.parametrize(
    "obstacle",
    [
        folder_named_as_file,
        file_named_as_folder,
        file_named_as_target,
        file_above_target,
        pipe_named_as_file,
    ],
)
def test_what_stands_in_the_way_is_named_and_kept(
    server: Unreliable, http: httpx2.Client, tmp_path: Path, obstacle: Callable[[Path], None]
) -> None:
    file = server.add("sub/model.bin", b"x")
    out = tmp_path / "parent/out"
    out.parent.mkdir()
    obstacle(out)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="move it away") as refused:
        fetch(http, [file], out)
    assert refused.value.code == "path_in_the_way"
    assert server.seen == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_that_the_file_system_does_not_take_is_told(
    server: Unreliable, http: httpx2.Client, tmp_path: Path
) -> None:
    file = server.add("model.bin", b"x").model_copy(update={"path": "a" * 240})
    with pytest.raises(InputError, match="name too long") as refused:
        fetch(http, [file], tmp_path / "out")
    assert refused.value.code == "cannot_write"


def test_a_file_that_fails_ends_the_others(
    server: Unreliable, http: httpx2.Client, tmp_path: Path
) -> None:
    """The other file would be waited for without an end."""
    bad = server.add("bad.bin", b"bad").model_copy(update={"sha256": "0" * 64})
    slow = server.add("slow.bin", b"x" * 1000)
    slow = slow.model_copy(update={"url": "http://127.0.0.1:9/x"})
    waits: list[float] = []
    retries = Retries(patience=1e6, sleep=waits.append)
    with pytest.raises(VerificationError):
        download_files(
            http,
            [slow, bad],
            tmp_path / "out",
            parallel=2,
            on_bytes=lambda _: None,
            retries=retries,
        )
