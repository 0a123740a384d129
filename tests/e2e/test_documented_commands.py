"""The shell commands of the documentation, run as written against both ways to serve."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bitmill_service.client.client import Client
from native import native_stack
from stores import wait_for
from tiny import tiny_llama
from warm_python import FORKED

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="runs in a source tree")
DEFAULT = "http://127.0.0.1:8737"


@contextmanager
def embedded(folder: Path, env: dict[str, str] | None = None) -> Iterator[str]:
    """`bitmill serve`, around a runner that acts on command unless `env` is given."""
    words = ["-P", "-m", "bitmill_service.cli.main", "serve", "--port", "0", "--json"]
    process = subprocess.Popen(
        [
            sys.executable,
            *words,
            "--data",
            str(folder / "data"),
            "--models",
            f"models={folder / 'models'}",
        ],
        env=os.environ | (runner() if env is None else env),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line, "the service did not start"
            text += line
        yield json.loads(text)["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()


def runner() -> dict[str, str]:
    """Environment in which jobs are done by `acting_runner`."""
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "BITMILL_RUNNER_MODULE": "acting_runner", "BITMILL_POLL_S": "0.1"}


@pytest.fixture(scope="module", params=["embedded", "production"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_llama(folder / "models" / "SmolLM2-135M")
    if request.param == "embedded":
        with embedded(folder) as address:
            yield address
    else:
        with native_stack(folder) as found:
            yield found["url"]


def shell(script: str, folder: Path, url: str, timeout: float = 100) -> str:
    """What a script prints; the documented address replaced, nothing else."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace(DEFAULT, url)],
        cwd=folder,
        env=os.environ | FORKED | {"BITMILL_URL": url},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_api_page_runs_as_written(url: str, tmp_path: Path) -> None:
    page = (ROOT / "docs/api.md").read_text()
    (script,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    assert script.count("curl") == 5
    out = shell(script, tmp_path / "work", url)
    assert "event: end" in out
    with Client(url) as client:
        job = client.list_jobs().jobs[0]
        files = {file.path: file for file in client.files(job.id).files}
    fetched = tmp_path / "work/model.safetensors"
    assert fetched.stat().st_size == files["model.safetensors"].size
    assert '"total_size"' in out
    # Broken off and called again, the download goes on.
    whole = fetched.read_bytes()
    fetched.write_bytes(whole[:300])
    (line,) = [line for line in script.splitlines() if "-O" in line]
    shell(f"url={url}; job={job.id}; {line}", tmp_path / "work", url)
    assert fetched.read_bytes() == whole


def test_the_readme_runs_as_written(url: str, tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text()
    block = next(b for b in re.findall(r"((?:^    .*\n)+)", page, re.M) if "curl" in b)
    lines = [
        line for line in block.replace("\n    ", "\n").splitlines() if "bitmill serve" not in line
    ]
    text = "\n".join(lines).strip() + "\n"
    submit, rest = text.split("\ncurl -sN", 1)
    job = json.loads(shell(submit, tmp_path / "work", url))["id"]
    shell(
        ("curl -sN" + rest).replace("JOB", job).replace("bitmill ", f"{bitmill()} "),
        tmp_path / "work",
        url,
    )
    with Client(url) as client:
        wait_for(lambda: client.get(job).terminal, "the job's end")
        listed = {file.path for file in client.files(job).files}
    got = tmp_path / "work/packed"
    assert {p.relative_to(got).as_posix() for p in got.rglob("*") if p.is_file()} == listed


def bitmill() -> str:
    return f"{sys.executable} -P -m bitmill_service.cli.main"


@pytest.mark.timeout(900)
def test_the_tutorial_runs_as_written(tmp_path: Path) -> None:
    """With a real runner, on a tiny model in the place of the one that is downloaded."""
    page = (ROOT / "docs/tutorial.md").read_text()
    blocks = [
        block.replace("bitmill ", f"{bitmill()} ")
        for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
        if "bitmill serve" not in block
    ]
    assert "serve --data data --models models=models &" in page
    assert len(blocks) == 6
    tiny_llama(
        tmp_path / "models" / "SmolLM2-135M",
        num_hidden_layers=1,
        hidden_size=256,
        head_dim=64,
        intermediate_size=256,
    )
    with embedded(tmp_path, env={"BITMILL_POLL_S": "0.1", "BITMILL_THREADS": "1"} | FORKED) as url:
        out = shell("\n".join(blocks), tmp_path, url, timeout=800)
    assert "all verified: packed" in out
    for made in ("packed/model.safetensors", "report.html", "map.json", "plain/config.json"):
        assert (tmp_path / made).is_file(), made
