"""Finished jobs through the Hub's own client, with and without keys, from disk and from S3."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import httpx2
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from moto.server import ThreadedMotoServer

from bitmill_service.api.files import CHUNK
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.migrate import upgrade
from bitmill_workers.store.records import JobRecord
from finished import Stack
from serving import serve
from tiny import tiny_llama

WEIGHTS = os.urandom(CHUNK + 1_000_000)
TEMPLATES = "additional_chat_templates/tool.jinja"


@dataclass
class Hub(Stack):
    """A service that asks for keys, a finished job in it, and a key that may read it."""

    key: str
    job: JobRecord

    @property
    def repo(self) -> str:
        return f"jobs/{self.job.id}"

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.url, token=self.key)


@pytest.fixture(scope="module", params=["disk", "s3", "relayed"])
def hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    given = {}
    server = None
    if request.param != "disk":
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        given = {
            "s3_bucket": "hub",
            "s3_endpoint": f"http://{host}:{port}",
            "s3_access_key": "k",
            "s3_secret_key": "not-a-default",
            "s3_redirect": request.param == "s3",
        }
        boto3.client(
            "s3",
            endpoint_url=given["s3_endpoint"],
            region_name="us-east-1",
            aws_access_key_id="k",
            aws_secret_access_key="s",
        ).create_bucket(Bucket="hub")
    settings = ServiceSettings(data=tmp_path_factory.mktemp("data"), **given)  # type: ignore[arg-type]
    app = create_app(settings)
    upgrade(app.state.context.database)
    key, _ = app.state.context.keys.store.create("reader", scopes=["read"], tenant="local")
    with serve(app) as url:
        stack = Stack(url, app.state.context)
        others = {"config.json": "{}", TEMPLATES: "{{ messages }}"}
        job = stack.finish(stack.running(), WEIGHTS, others)
        yield Hub(url, stack.context, key, job)
    if server is not None:
        server.stop()


def digest(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_snapshot_brings_every_file_and_its_right_bytes(hub: Hub, tmp_path: Path) -> None:
    options = {"endpoint": hub.url, "token": hub.key, "cache_dir": tmp_path}
    folder = Path(snapshot_download(hub.repo, **options))
    listed = {file.path: file for file in hub.context.jobs.artifacts(hub.job.id)}
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == listed.keys()
    assert TEMPLATES in found
    for path, file in listed.items():
        assert digest(folder / path) == file.sha256, path
    assert snapshot_download(hub.repo, **options, revision=folder.name) == str(folder)
    again = hf_hub_download(hub.repo, "model.safetensors", **options)
    assert Path(again).resolve().name == hashlib.sha256(WEIGHTS).hexdigest()


def test_the_api_object_understands_what_is_there(hub: Hub) -> None:
    info = hub.api.model_info(hub.repo, files_metadata=True)
    assert len(info.sha) == 40
    sizes = {s.rfilename: s.size for s in info.siblings or []}
    assert sizes["model.safetensors"] == len(WEIGHTS)
    top = {entry.path: type(entry).__name__ for entry in hub.api.list_repo_tree(hub.repo)}
    assert top["additional_chat_templates"] == "RepoFolder"
    assert top["model.safetensors"] == "RepoFile"
    assert TEMPLATES not in top
    below = hub.api.list_repo_tree(hub.repo, "additional_chat_templates")
    assert [entry.path for entry in below] == [TEMPLATES]
    assert TEMPLATES in hub.api.list_repo_files(hub.repo)
    assert hub.api.file_exists(hub.repo, "config.json")
    assert not hub.api.file_exists(hub.repo, "absent.json")
    assert hub.api.repo_exists(hub.repo)
    assert [ref.target_commit for ref in hub.api.list_repo_refs(hub.repo).branches] == [info.sha]


def test_what_is_not_there_is_refused_in_the_clients_words(hub: Hub, tmp_path: Path) -> None:
    options = {"endpoint": hub.url, "token": hub.key, "cache_dir": tmp_path}
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("jobs/none", "config.json", **options)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("org/model", "config.json", **options)
    with pytest.raises(RevisionNotFoundError, match="no revision 'v1'"):
        hf_hub_download(hub.repo, "config.json", revision="v1", **options)
    with pytest.raises(EntryNotFoundError, match=r"no file 'absent\.json'"):
        hf_hub_download(hub.repo, "absent.json", **options)
    waiting = hub.queued()
    with pytest.raises(RepositoryNotFoundError, match="is queued and has no files"):
        hub.api.model_info(f"jobs/{waiting.id}")
    with pytest.raises(EntryNotFoundError):
        list(hub.api.list_repo_tree(hub.repo, "absent"))
    for path in ("..%2f..%2fetc%2fpasswd", "../../../etc/passwd", "%00", "a" * 3000, "ö.json"):
        for method in ("GET", "HEAD"):
            address = f"{hub.url}/{hub.repo}/resolve/main/{path}"
            answer = httpx2.request(method, address, headers={"Authorization": f"Bearer {hub.key}"})
            assert answer.status_code == 404, path


def test_a_wrong_key_is_401_and_a_hub_token_is_named_and_not_written_down(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "hf_" + "aB3" * 11
    for token, words in (
        (False, "this call needs an API key"),
        (hub.key[:-1], "unknown, mistyped, expired or gone"),
        (secret, "this is a token of the Hugging Face Hub"),
    ):
        api = HfApi(endpoint=hub.url, token=token)
        with pytest.raises(HfHubHTTPError, match=words) as refused:
            api.model_info(hub.repo)
        assert refused.value.response.status_code == 401
        with pytest.raises(HfHubHTTPError, match=words):
            hf_hub_download(
                hub.repo, "config.json", endpoint=hub.url, token=token, cache_dir=tmp_path
            )
    assert secret not in caplog.text


def test_headers_are_those_that_clients_need_and_no_others(hub: Hub) -> None:
    with httpx2.Client(base_url=hub.url, headers={"Authorization": f"Bearer {hub.key}"}) as http:
        sha = http.get(f"/api/models/{hub.repo}").json()["sha"]
        answer = http.head(f"/{hub.repo}/resolve/main/model.safetensors")
        assert answer.status_code == 200
        assert answer.headers["x-repo-commit"] == sha
        assert answer.headers["content-length"] == str(len(WEIGHTS))
        assert answer.headers["etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
        absent = http.head(f"/{hub.repo}/resolve/main/absent")
        assert (absent.headers["x-error-code"], absent.headers["x-repo-commit"]) == (
            "EntryNotFound",
            sha,
        )
        part = http.get(
            f"/{hub.repo}/resolve/{sha}/model.safetensors",
            headers={"Range": "bytes=10-19"},
            follow_redirects=True,
        )
        assert (part.status_code, part.content) == (206, WEIGHTS[10:20])
        for seen in (answer, absent, part, http.get("/api/agent-harnesses")):
            assert not [name for name in seen.headers if "xet" in name]


def test_parts_and_conditions_of_a_file_wherever_it_lies(hub: Hub) -> None:
    redirected = hub.context.settings.s3_bucket is not None and hub.context.settings.s3_redirect
    url = f"{hub.url}/v1/jobs/{hub.job.id}/files/model.safetensors"
    headers = {"Authorization": f"Bearer {hub.key}"}
    with httpx2.Client(follow_redirects=True, headers=headers) as http:
        first, last = len(WEIGHTS) - 10, len(WEIGHTS) - 1
        part = http.get(url, headers={"Range": f"bytes={first}-"})
        assert (part.status_code, part.content) == (206, WEIGHTS[first:])
        assert part.headers["content-range"] == f"bytes {first}-{last}/{len(WEIGHTS)}"
        assert len(part.history) == redirected
        head = http.head(url)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(WEIGHTS))
        etag = head.headers["etag"]
        assert http.get(url, headers={"If-None-Match": etag}).status_code == 304
        assert http.get(url, headers={"If-Match": '"other"'}).status_code == 412
        whole = http.get(url)
        assert (whole.content == WEIGHTS, len(whole.history)) == (True, redirected)
        if not redirected:
            resumed = {"Range": "bytes=5-6", "If-Range": '"other"'}
            assert http.get(url, headers=resumed).content == WEIGHTS
            beyond = http.get(url, headers={"Range": f"bytes={len(WEIGHTS)}-"})
            assert (beyond.status_code, beyond.json()["code"]) == (416, "range_not_satisfiable")


def test_a_process_of_its_own_downloads_with_the_environment_alone(
    hub: Hub, tmp_path: Path
) -> None:
    """`hf download jobs/<id>`, with HF_ENDPOINT and the key as HF_TOKEN."""
    command = [Path(sysconfig.get_path("scripts"), "hf"), "download", hub.repo]
    done = subprocess.run(
        [*command, "--local-dir", tmp_path / "out"],
        env=os.environ
        | {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.key, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "out" / "model.safetensors") == hashlib.sha256(WEIGHTS).hexdigest()


LOAD = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
repo = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(repo)
tokenizer = AutoTokenizer.from_pretrained(repo)
assert AutoConfig.from_pretrained(repo).model_type == "llama"
print(model.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=2).shape[1])
"""


@pytest.mark.parametrize("hub", ["disk"], indirect=True)
def test_transformers_loads_model_and_tokenizer_by_name(hub: Hub, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "tiny")
    others = {p.name: p.read_text() for p in model.iterdir() if p.suffix in (".json", ".jinja")}
    weights = (model / "model.safetensors").read_bytes()
    job = hub.finish(hub.running(), weights, others)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, f"jobs/{job.id}"],
        env=os.environ
        | {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.key, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2
