"""Range, If-Range, If-None-Match, HEAD and digests, over real HTTP."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator

import httpx2
import pytest
from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers

from bitmill_service.api.files import CHUNK, StoredFile, file_response, parse_range
from bitmill_service.http import problems
from bitmill_service.http.problems import ProblemError
from serving import serve

CONTENT = bytes(i * 7 % 251 for i in range(CHUNK + 1000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ETAG = f'"{SHA256}"'


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredFile:
    path = tmp_path_factory.mktemp("files") / "model.safetensors"
    path.write_bytes(CONTENT)
    return StoredFile(path, "model.safetensors", len(CONTENT), SHA256)


@pytest.fixture(scope="module")
def http(stored: StoredFile) -> Iterator[httpx2.Client]:
    app = FastAPI()
    problems.install(app)

    @app.get("/file")
    @app.head("/file")
    def read(request: Request) -> Response:
        return file_response(stored, request.method, request.headers)

    with serve(app) as url, httpx2.Client(base_url=url) as client:
        yield client


def test_whole_file_carries_digest_and_length(http: httpx2.Client) -> None:
    answer = http.get("/file")
    assert answer.status_code == 200
    assert answer.content == CONTENT
    assert answer.headers["etag"] == ETAG
    assert answer.headers["content-length"] == str(len(CONTENT))
    digest = base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        (f"bytes={CHUNK - 5}-", CHUNK - 5, len(CONTENT)),
        ("bytes=-7", len(CONTENT) - 7, len(CONTENT)),
        (f"bytes=-{len(CONTENT) + 50}", 0, len(CONTENT)),
        (f"bytes=5-{len(CONTENT) * 2}", 5, len(CONTENT)),
    ],
)
def test_range_gives_exactly_these_bytes(
    http: httpx2.Client, header: str, start: int, end: int
) -> None:
    answer = http.get("/file", headers={"Range": header})
    assert answer.status_code == 206
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(CONTENT)}"
    assert answer.content == CONTENT[start:end]
    assert answer.headers["etag"] == ETAG


@pytest.mark.parametrize(
    "header",
    [
        "bytes=9-3",
        "lines=0-3",
        "bytes=0-1,4-5",
        "bytes=-",
        "bytes=a-b",
        "bytes",
        f"bytes={'9' * 5000}-",
    ],
)
def test_malformed_or_multiple_ranges_give_the_whole_file(http: httpx2.Client, header: str) -> None:
    answer = http.get("/file", headers={"Range": header})
    assert answer.status_code == 200
    assert len(answer.content) == len(CONTENT)


@pytest.mark.parametrize("header", [f"bytes={len(CONTENT)}-", "bytes=-0"])
def test_range_outside_is_416_with_the_size(http: httpx2.Client, header: str) -> None:
    answer = http.get("/file", headers={"Range": header})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "range_not_satisfiable"


def test_if_range_decides_between_part_and_whole(http: httpx2.Client) -> None:
    part = {"Range": "bytes=5-9"}
    assert http.get("/file", headers=part | {"If-Range": ETAG}).status_code == 206
    assert http.get("/file", headers=part | {"If-Range": '"other"'}).content == CONTENT
    assert http.get("/file", headers=part | {"If-Range": f"W/{ETAG}"}).status_code == 200
    modified = http.head("/file").headers["last-modified"]
    assert http.get("/file", headers=part | {"If-Range": modified}).status_code == 206


@pytest.mark.parametrize("header", [ETAG, f"W/{ETAG}", f'"x", {ETAG}', "*"])
def test_known_content_is_not_sent_again(http: httpx2.Client, header: str) -> None:
    answer = http.get("/file", headers={"If-None-Match": header})
    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == ETAG


def test_other_content_is_sent(http: httpx2.Client) -> None:
    assert http.get("/file", headers={"If-None-Match": '"other"'}).status_code == 200


def test_head_has_the_headers_and_no_body(http: httpx2.Client) -> None:
    answer = http.head("/file", headers={"Range": "bytes=0-3"})
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.headers["etag"] == ETAG


def test_file_that_is_gone_or_cut_is_refused(http: httpx2.Client, stored: StoredFile) -> None:
    missing = StoredFile(stored.path.with_name("gone"), "gone", 3, SHA256)
    longer = StoredFile(stored.path, stored.name, stored.size + 1, SHA256)
    for file in (missing, longer):
        with pytest.raises(ProblemError) as refused:
            file_response(file, "GET", Headers({}))
        assert refused.value.code == "file_missing"
        assert refused.value.status == 410


def test_range_of_an_empty_file_is_not_satisfiable() -> None:
    assert parse_range(None, 0) is None
    with pytest.raises(ProblemError):
        parse_range("bytes=0-", 0)
