"""Pushes: one commit with a model card, gone on with where they broke; and where tokens lie."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import ModelCard
from pydantic import SecretStr

import bitmill
from bitmill.config.quantization import Calibration
from bitmill.errors import InputError, ResourceError, VerificationError
from bitmill.formats.export_plan import ExportTarget
from bitmill.io.manifest import write_manifest
from bitmill.library.push import push
from bitmill.results import QualityReport, QualityRow, TextQuality
from bitmill_service.client.client import Client
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.execution.stop import StopRequest
from bitmill_workers.execution.supervisor import Supervisor
from bitmill_workers.job_spec import PushTarget
from bitmill_workers.store.migrate import upgrade
from finished import Stack
from hub_writing import TOKEN, WritableHub
from serving import serve
from tiny import tiny_llama
from weights import pack_model

# huggingface_hub itself uploads in a way that its HTTP client calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Command = Callable[..., tuple[int, str, str]]
NAME = "org/packed"
LOAD = """
import sys, torch, bitmill
there, here = (bitmill.load(name)(torch.arange(3, 35)[None]).logits for name in sys.argv[1:])
assert torch.equal(there, here)
try:
    bitmill.load("org/none")
except bitmill.BitmillError as error:
    assert error.code == "model_not_found", error
else:
    raise AssertionError("loaded what is not there")
"""


def report() -> QualityReport:
    text = TextQuality(windows=2, tokens=64, perplexity=9.5, perplexity_se=0.25, kl=0.125)
    source = QualityRow(method="source", texts={"wiki_evaluation": text})
    packed = source.model_copy(
        update={"method": "knapsack", "code_bits": 3.1, "bits": 3.25, "size": 12345}
    )
    return QualityReport(rows=(source, packed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder of two files with weights."""
    source = tiny_llama(tmp_path_factory.mktemp("source") / "model")
    packed = pack_model(
        source, tmp_path_factory.mktemp("packed"), cycle=(3, 4), max_shard_bytes=200_000
    )
    (packed.folder / "quality.json").write_text(report().to_json())
    write_manifest(packed.folder)
    return packed.folder


@pytest.fixture(autouse=True)
def without_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub of these tests takes Git LFS alone; children read the variable."""
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[WritableHub, str]]:
    made = WritableHub(tmp_path / "hub")
    made.root.mkdir()
    with serve(made.app()) as url:
        yield made, url


def test_a_pushed_folder_is_loaded_by_its_name(
    folder: Path,
    hub: tuple[WritableHub, str],
    tmp_path: Path,
) -> None:
    made, url = hub
    seen: list[tuple[int, int]] = []
    pushed = push(
        folder,
        NAME,
        token=TOKEN,
        base_model="org/model",
        license="apache-2.0",
        calibration=Calibration(sequences=8, length=256),
        endpoint=url,
        on_bytes=lambda done, total: seen.append((done, total)),
    )
    assert made.private[NAME]
    assert seen[-1] == (pushed.bytes, pushed.bytes)
    there = made.root / NAME
    own = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name: (there / name).read_bytes() for name in own} == own
    card = (there / "README.md").read_text()
    for told in (
        'base_model: "org/model"',
        'base_model_relation: "quantized"',
        'license: "apache-2.0"',
        '"3-bit"',
        "| knapsack | 3.250 | 12,345 | 9.500 ± 0.250 | 0.1250 |",
        "8 windows of 256 tokens of `wiki_calibration`",
        f'bitmill.load("{NAME}")',
        f"vllm serve {NAME}",
        "import bitmill.hf\n",
        "bitmill export packed --format gguf",
    ):
        assert told in card, told
    read = ModelCard(card).data  # as the Hub's client reads it
    assert (read.base_model, read.license, read.library_name) == (
        "org/model",
        "apache-2.0",
        "transformers",
    )
    assert (there / "bit_width_map.png").read_bytes().startswith(b"\x89PNG")
    there_and_here = [sys.executable, "-c", LOAD, NAME, str(folder)]
    env = os.environ | {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    loaded = subprocess.run(there_and_here, env=env, capture_output=True, text=True, timeout=120)
    assert loaded.returncode == 0, loaded.stderr


def test_what_has_arrived_is_not_sent_again(folder: Path, hub: tuple[WritableHub, str]) -> None:
    made, url = hub
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    made.refuse_puts_after = 1
    with pytest.raises(ResourceError) as broken:
        push(folder, NAME, token=TOKEN, endpoint=url)
    assert broken.value.code == "hub_unavailable"
    assert "signature" not in str(broken.value)
    assert broken.value.__context__ is None or broken.value.__suppress_context__
    assert not (made.root / NAME / "config.json").exists(), "a part of a push is visible"
    assert len(made.put) == 1
    made.refuse_puts_after = None
    push(folder, NAME, token=TOKEN, endpoint=url)
    assert len(made.put) == len(set(made.put)) == len(files)
    push(folder, NAME, token=TOKEN, endpoint=url)
    assert len(made.put) == len(files)


def test_a_wrong_token_and_a_damaged_folder_are_refused(
    folder: Path, hub: tuple[WritableHub, str], tmp_path: Path
) -> None:
    made, url = hub
    with pytest.raises(InputError, match="right to write") as refused:
        push(folder, NAME, token="hf_another", endpoint=url)
    assert refused.value.code == "push_refused"
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{}")
    write_manifest(damaged)
    (damaged / "config.json").write_text("[]")
    with pytest.raises(bitmill.BitmillError, match="SHA-256"):
        push(damaged, NAME, token=TOKEN, endpoint=url)
    assert not (made.root / NAME).exists()


@pytest.mark.parametrize(
    ("path", "content", "problem"),
    [
        ("config.json", b"{}", "has other bytes"),
        ("bit_width_map.png", None, "is not there"),
        ("model-00001-of-00002.safetensors", b"weights", "has another SHA-256"),
    ],
)
def test_what_the_hub_has_is_compared_with_the_folder(
    folder: Path, hub: tuple[WritableHub, str], path: str, content: bytes | None, problem: str
) -> None:
    made, url = hub
    made.kept_as[path] = content
    with pytest.raises(VerificationError, match=problem) as different:
        push(folder, NAME, token=TOKEN, endpoint=url)
    assert different.value.param == path
    del made.kept_as[path]
    push(folder, NAME, token=TOKEN, endpoint=url)


def test_the_licence_is_that_of_the_base_models_card(
    folder: Path, hub: tuple[WritableHub, str]
) -> None:
    made, url = hub
    for name, front in (("model", "license: gemma\n"), ("silent", "tags: [a]\n")):
        (made.root / "org" / name).mkdir(parents=True)
        (made.root / "org" / name / "README.md").write_text(f"---\n{front}---\n")
    for base, line in (
        ("org/model", 'license: "gemma"\n'),
        ("org/silent", None),
        ("org/none", None),
    ):
        push(folder, NAME, token=TOKEN, base_model=base, endpoint=url)
        card = (made.root / NAME / "README.md").read_text()
        assert f'base_model: "{base}"\n' in card
        assert (line in card) if line else ("license" not in card)


def test_the_command_pushes_a_folder(
    folder: Path,
    hub: tuple[WritableHub, str],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, url = hub
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    more = ("--public", "--base-model", "org/model", "--license", "mit")
    code, out, err = command("push", folder, NAME, *more)
    assert code == 0, err
    assert f"{url}/{NAME}" in out
    assert not made.private[NAME]
    card = (made.root / NAME / "README.md").read_text()
    assert 'base_model: "org/model"\nbase_model_relation: "quantized"\nlicense: "mit"\n' in card
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    code, out, err = command("push", folder, NAME)
    assert code == 2
    assert "right to write" in err
    assert "hf_another" not in out + err


KEY = base64.b64encode(bytes(range(32))).decode()


@pytest.fixture
def pushing(
    tmp_path: Path, models: Path, hub: tuple[WritableHub, str]
) -> Iterator[tuple[Stack, Callable[[], None]]]:
    """A service that takes tokens, and what runs its jobs."""
    settings = ServiceSettings(
        data=tmp_path / "data",
        model_roots={"models": models},
        hub_endpoint=hub[1],
        hub_patience_s=0.01,
        push_key=KEY,
        poll_s=0.05,
    )
    app = create_app(settings)
    context = app.state.context
    upgrade(context.database)
    with serve(app) as url, StopRequest() as stop:

        def work() -> None:
            supervisor = Supervisor(settings, context.database)
            while supervisor.run_next(stop):
                pass

        yield Stack(url, context), work


def everything(data: Path) -> bytes:
    """All files below the data folder, and every row of the database as text."""
    found = b"".join(file.read_bytes() for file in data.rglob("*") if file.is_file())
    with sqlite3.connect(data / "bitmill.db") as opened:
        return found + "\n".join(opened.iterdump()).encode()


def sealed(data: Path) -> int:
    with sqlite3.connect(data / "bitmill.db") as opened:
        return int(opened.execute("SELECT count(*) FROM push_tokens").fetchone()[0])


def test_a_job_is_pushed_and_its_token_is_nowhere(
    pushing: tuple[Stack, Callable[[], None]],
    hub: tuple[WritableHub, str],
    folder: Path,
    tmp_path: Path,
) -> None:
    stack, work = pushing
    made, _ = hub
    others = {
        file.name: file.read_text() for file in folder.iterdir() if file.suffix != ".safetensors"
    }
    job = stack.finish(stack.running(), b"weights", {"README.txt": "none", **_texts(others)})
    with Client(stack.url) as client:
        target = PushTarget(repo_id=NAME, license="mit")
        pushed = client.push(job.id, target, TOKEN, idempotency_key="once")
        assert client.push(job.id, target, TOKEN, idempotency_key="once").id == pushed.id
        assert (pushed.kind, pushed.parent_id) == ("push", job.id)
        assert sealed(tmp_path / "data") == 1
        assert TOKEN.encode() not in everything(tmp_path / "data")
        work()
        done = client.wait(pushed.id, timeout=60)
        assert done.result is not None
        assert done.result["repo_id"] == NAME
        told = [event.model_dump_json() for event in client.events(pushed.id)]
        told += list(client.logs(pushed.id))
    assert "config.json" in {file.name for file in (made.root / NAME).iterdir()}
    assert sealed(tmp_path / "data") == 0
    assert TOKEN not in "".join(told) + done.model_dump_json()
    assert TOKEN.encode() not in everything(tmp_path / "data")
    with Client(stack.url) as client, pytest.raises(InputError) as again:
        client.retry(pushed.id)
    assert again.value.code == "push_token_lost"


def _texts(others: dict[str, str]) -> dict[str, str]:
    kept = ("bit_width_map.json", "quality.json", "MANIFEST.json", "SHA256SUMS")
    return {name: text for name, text in others.items() if name not in kept}


def test_the_token_goes_however_a_push_ends(
    pushing: tuple[Stack, Callable[[], None]], hub: tuple[WritableHub, str], tmp_path: Path
) -> None:
    stack, work = pushing
    job = stack.finish(stack.running(), b"weights", {"config.json": "{}"})
    target = PushTarget(repo_id=NAME)
    with Client(stack.url) as client:
        cancelled = client.push(job.id, target, TOKEN)
        client.cancel(cancelled.id)
        assert sealed(tmp_path / "data") == 0
        refused = client.push(job.id, target, "hf_another")
        work()
        failed = client.get(refused.id)
    assert failed.error is not None
    assert (failed.state, failed.error.code) == ("failed", "push_refused")
    assert sealed(tmp_path / "data") == 0
    assert b"hf_another" not in everything(tmp_path / "data")
    assert not (hub[0].root / NAME).exists()


def test_a_broken_push_of_a_job_goes_on_with_the_token_that_was_kept(
    pushing: tuple[Stack, Callable[[], None]], hub: tuple[WritableHub, str], tmp_path: Path
) -> None:
    stack, work = pushing
    made, _ = hub
    job = stack.finish(stack.running(), b"weights", {"config.json": "{}"})
    made.refusals = 1
    with Client(stack.url) as client:
        pushed = client.push(job.id, PushTarget(repo_id=NAME), TOKEN)
        work()
        done = client.get(pushed.id)
        told = [event.model_dump_json() for event in client.events(pushed.id)]
    assert (done.state, done.attempt, made.refusals) == ("succeeded", 2, 0)
    assert any("the Hub did not take model.safetensors" in one for one in told)
    assert TOKEN not in "".join(told)
    assert (made.root / NAME / "model.safetensors").read_bytes() == b"weights"
    assert sealed(tmp_path / "data") == 0


def test_a_token_opens_under_the_key_that_it_was_sealed_with_alone(
    pushing: tuple[Stack, Callable[[], None]], hub: tuple[WritableHub, str], tmp_path: Path
) -> None:
    stack, _ = pushing
    job = stack.finish(stack.running(), b"weights", {"config.json": "{}"})
    another = SecretStr(base64.b64encode(bytes(32)).decode())
    settings = stack.context.settings.model_copy(update={"push_key": another})
    with Client(stack.url) as client, StopRequest() as stop:
        pushed = client.push(job.id, PushTarget(repo_id=NAME), TOKEN)
        assert Supervisor(settings, stack.context.database).run_next(stop)
        failed = client.get(pushed.id)
    assert failed.error is not None
    assert (failed.state, failed.error.code) == ("failed", "push_token_lost")
    assert sealed(tmp_path / "data") == 0
    assert not (hub[0].root / NAME).exists()


def test_an_export_is_pushed_by_the_command_with_the_report_of_its_job(
    pushing: tuple[Stack, Callable[[], None]],
    hub: tuple[WritableHub, str],
    folder: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stack, work = pushing
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    job = stack.packed(folder)
    with Client(stack.url) as client:
        made = client.export(job.id, ExportTarget(format="dequantized"))
        work()
        asked = ("push", made.id, NAME, "--base-model", "org/model", "--url", stack.url, "--json")
        code, out, err = command(*asked)
        assert code == 0, err
        work()
        done = client.get(json.loads(out)["id"])
    assert (done.kind, done.parent_id, done.state) == ("push", made.id, "succeeded")
    card = (hub[0].root / NAME / "README.md").read_text()
    for told in (
        'base_model: "org/model"',
        "| knapsack | 3.250 | 12,345 | 9.500 ± 0.250 | 0.1250 |",
        "64 windows of 2048 tokens of `wiki_calibration`",
        "quantized by Bitmill and exported for other runtimes. Before the export: 3.250 bits",
        f"vllm serve {NAME}\n",
    ):
        assert told in card, told
    assert "import bitmill" not in card
    assert "3-bit" not in card


def test_without_a_key_no_token_is_taken(stack: Stack, http: httpx2.Client) -> None:
    job = stack.succeeded()
    body: dict[str, Any] = {"repo_id": NAME, "token": TOKEN}
    answer = http.post(f"/v1/jobs/{job.id}/push", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "push_not_configured")
    assert TOKEN not in answer.text
    wrong = http.post(f"/v1/jobs/{job.id}/push", json={**body, "repo_id": "no/such/name"})
    assert (wrong.status_code, wrong.json()["param"]) == (422, "repo_id")
    assert TOKEN not in wrong.text


@pytest.mark.parametrize("key", ["short", base64.b64encode(b"x" * 31).decode(), "*" * 44])
def test_a_key_of_another_size_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="32 bytes in base64"):
        ServiceSettings(push_key=key)
