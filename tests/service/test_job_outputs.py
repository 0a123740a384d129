"""Map, report, log and files of jobs in every state."""

from __future__ import annotations

import hashlib

import httpx2
import pytest

from bitmill.config.made_for import MADE_FOR_NAME, MadeFor
from bitmill.errors import NumericalError
from bitmill_service.api.views import log_view
from bitmill_workers.store.records import JobRecord, LogPage
from finished import MAP, REPORT, Stack


@pytest.fixture(scope="module")
def job(stack: Stack) -> JobRecord:
    return stack.succeeded(b"0123456789" * 500)


def test_map_and_report_are_the_published_ones(
    http: httpx2.Client, stack: Stack, job: JobRecord
) -> None:
    assert http.get(f"/v1/jobs/{job.id}/bit-width-map").json() == MAP
    known = MadeFor(shape="a" * 64, weights="b" * 64, model="org/base")
    other = stack.finish(stack.running(), others={MADE_FOR_NAME: known.to_json()})
    told = http.get(f"/v1/jobs/{other.id}/bit-width-map").json()
    assert told == MAP | {"made_for": known.model_dump()}
    assert http.get(f"/v1/jobs/{job.id}/report").json() == REPORT


def test_files_are_listed_with_digests_and_can_be_fetched(
    http: httpx2.Client, job: JobRecord
) -> None:
    listed = http.get(f"/v1/jobs/{job.id}/files").json()
    assert [file["path"] for file in listed["files"]] == [
        "MANIFEST.json",
        "SHA256SUMS",
        "bit_width_map.json",
        "model.safetensors",
        "quality.json",
    ]
    assert listed["total_size"] == sum(file["size"] for file in listed["files"])
    for file in listed["files"]:
        answer = http.get(file["url"])
        assert len(answer.content) == file["size"]
        assert hashlib.sha256(answer.content).hexdigest() == file["sha256"]
        assert answer.headers["etag"] == f'"{file["sha256"]}"'


def test_file_takes_ranges_and_head(http: httpx2.Client, job: JobRecord) -> None:
    url = f"/v1/jobs/{job.id}/files/model.safetensors"
    etag = http.head(url).headers["etag"]
    part = http.get(url, headers={"Range": "bytes=4998-", "If-Range": etag})
    assert (part.status_code, part.content) == (206, b"89")
    assert http.get(url, headers={"If-None-Match": etag}).status_code == 304


def test_file_of_an_object_store_is_redirected_to_and_head_is_answered_here(
    http: httpx2.Client, stack: Stack, job: JobRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = stack.context.artifacts
    monkeypatch.setattr(here, "local_path", lambda file: None)
    monkeypatch.setattr(here, "url", lambda file: f"https://storage.example/{file.path}")
    url = f"/v1/jobs/{job.id}/files/model.safetensors"
    answer = http.get(url)
    assert (answer.status_code, answer.headers["location"]) == (
        302,
        "https://storage.example/model.safetensors",
    )
    head = http.head(url)
    digest = hashlib.sha256(b"0123456789" * 500).hexdigest()
    assert (head.status_code, head.headers["etag"]) == (200, f'"{digest}"')
    assert head.headers["content-length"] == "5000"


@pytest.mark.parametrize(
    "path", ["nothing", "../quality.json", "..%2f..%2fbitmill.db", "%2fetc%2fpasswd", "a%00b"]
)
def test_only_listed_paths_are_files(http: httpx2.Client, job: JobRecord, path: str) -> None:
    answer = http.get(f"/v1/jobs/{job.id}/files/{path}")
    assert answer.status_code == 404
    assert answer.json()["code"] in ("no_such_file", "not_found")


@pytest.mark.parametrize("part", ["bit-width-map", "report", "files", "files/quality.json"])
def test_unfinished_and_failed_jobs_have_no_outputs(
    http: httpx2.Client, stack: Stack, part: str
) -> None:
    running = http.get(f"/v1/jobs/{stack.running().id}/{part}")
    assert (running.status_code, running.json()["code"]) == (409, "job_not_finished")
    failed = http.get(f"/v1/jobs/{stack.failed().id}/{part}")
    assert (failed.status_code, failed.json()["code"]) == (404, "no_such_output")


def test_lost_file_is_gone_not_an_error_of_the_server(http: httpx2.Client, stack: Stack) -> None:
    job = stack.succeeded()
    for name in ("quality.json", "model.safetensors"):
        file = stack.context.jobs.artifact(job.id, name)
        assert file is not None
        place = stack.context.artifacts.local_path(file)
        assert place is not None
        place.unlink()
    for part in ("report", "files/model.safetensors"):
        answer = http.get(f"/v1/jobs/{job.id}/{part}")
        assert (answer.status_code, answer.json()["code"]) == (410, "file_missing")


def test_log_is_read_in_pieces_by_byte_offset(http: httpx2.Client, stack: Stack) -> None:
    job = stack.running()
    stack.leases.append_log(job.id, job.token, "erste Zeile\nzweite größe".encode(), limit=1 << 20)
    first = http.get(f"/v1/jobs/{job.id}/logs").json()
    assert first["text"] == "erste Zeile\nzweite größe"
    assert not first["end"]
    rest = http.get(f"/v1/jobs/{job.id}/logs", params={"offset": 12}).json()
    assert (rest["text"], rest["next_offset"]) == ("zweite größe", first["next_offset"])
    assert stack.leases.fail(job.id, job.token, NumericalError("no luck"))
    assert http.get(f"/v1/jobs/{job.id}/logs", params={"offset": 12}).json()["end"]


@pytest.mark.parametrize("character", ["ä", "€", "𝄞"])
def test_character_cut_in_two_waits_for_its_rest(character: str) -> None:
    data = f"ab{character}".encode()
    for cut in range(3, len(data)):
        page = log_view(LogPage(data[:cut], 0, cut, len(data)), finished=False)
        assert (page.text, page.next_offset) == ("ab", 2)
    whole = log_view(LogPage(data, 0, len(data), len(data)), finished=True)
    assert (whole.text, whole.end) == (f"ab{character}", True)
