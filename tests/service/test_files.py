"""Ranges, conditions, HEAD and digests, over real HTTP."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator

import httpx2
import pytest
from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers

from bitmill_service.api.files import (
    CHUNK,
    StoredFile,
    elsewhere_response,
    file_response,
    parse_range,
)
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


NEVER, LONG_AGO = "Fri, 01 Jan 2100 00:00:00 GMT", "Thu, 01 Jan 1970 00:00:10 GMT"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"If-Match": "{etag}"}, 200),
        ({"If-Match": '"a", {etag}'}, 200),
        ({"If-Match": "*"}, 200),
        ({"If-Match": '"other"'}, 412),
        ({"If-Match": "W/{etag}"}, 412),
        ({"If-Match": '"other"', "If-None-Match": "{etag}"}, 412),
        ({"If-Match": "{etag}", "If-None-Match": "{etag}"}, 304),
        ({"If-Unmodified-Since": NEVER}, 200),
        ({"If-Unmodified-Since": LONG_AGO}, 412),
        ({"If-Unmodified-Since": LONG_AGO, "If-Match": "{etag}"}, 200),
        ({"If-Unmodified-Since": "yesterday"}, 200),
        ({"If-Modified-Since": NEVER}, 304),
        ({"If-Modified-Since": "{modified}"}, 304),
        ({"If-Modified-Since": LONG_AGO}, 200),
        ({"If-Modified-Since": "soon"}, 200),
        ({"If-Modified-Since": NEVER, "If-None-Match": '"other"'}, 200),
    ],
)
def test_conditions_are_held(
    http: httpx2.Client, method: str, headers: dict[str, str], status: int
) -> None:
    plain = http.get("/file").headers
    known = {"etag": plain["etag"], "modified": plain["last-modified"]}
    sent = {name: value.format(**known) for name, value in headers.items()}
    answer = http.request(method, "/file", headers=sent)
    assert answer.status_code == status
    if status == 412 and method == "GET":
        assert answer.json()["code"] == "precondition_failed"
        assert answer.json()["param"] in headers


@pytest.mark.parametrize(
    ("headers", "method", "status"),
    [
        ({}, "GET", 302),
        ({}, "HEAD", 200),
        ({"If-None-Match": '"{sha256}"'}, "GET", 304),
        ({"If-None-Match": '"{sha256}"'}, "HEAD", 304),
        ({"If-None-Match": '"other"'}, "GET", 302),
        ({"If-Match": '"{sha256}"'}, "GET", 302),
        ({"If-Modified-Since": NEVER}, "GET", 302),
        ({"If-Unmodified-Since": LONG_AGO}, "GET", 302),
    ],
)
def test_conditions_of_a_file_elsewhere(headers: dict[str, str], method: str, status: int) -> None:
    sha256 = "0" * 64
    sent = Headers({name: value.format(sha256=sha256) for name, value in headers.items()})
    answer = elsewhere_response("a.json", 5, sha256, method, sent, lambda: "https://store/x")
    assert answer.status_code == status
    with pytest.raises(ProblemError):
        elsewhere_response("a", 5, sha256, method, Headers({"If-Match": '"no"'}), lambda: "")


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
