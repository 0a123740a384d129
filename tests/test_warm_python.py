"""Children that are forked tell, die and are ended as those that are started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmill.errors import BitmillError
from bitmill.runtime.child import run_child
from stores import processes_of, wait_for
from warm_python import warm_python


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With a server, once the first program has ended."""
    folder = tmp_path_factory.mktemp("warm")
    with warm_python(folder):
        end_of(folder)
        wait_for((folder / "socket").exists, "the server")
        yield folder
        for pid in processes_of(str(folder)):
            os.kill(pid, signal.SIGKILL)


def end_of(folder: Path) -> dict[str, object]:
    with pytest.raises(BitmillError) as ended:
        run_child("the check", ["-m", "bitmill", "nothing", str(folder / "nothing.json")])
    return ended.value.to_dict()


def waiting(folder: Path) -> subprocess.Popen[bytes]:
    """A program that reads what nobody writes."""
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "bitmill", "verify", str(folder / "pipe")]
    return subprocess.Popen(command, env=environment)


def forked(folder: Path, caller: int) -> list[int]:
    """Of a caller: the process that oversees its program, and the program."""
    server = next(pid for pid in sorted(processes_of(str(folder))) if "serve" in words(pid))
    return [p for p in sorted(processes_of(str(folder))) if p not in (server, caller)]


def words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def test_forked_program_tells_what_a_started_one_tells(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = end_of(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert end_of(folder) == warm  # of Python itself: the environment is another


def test_killed_program_is_seen_as_killed(folder: Path) -> None:
    caller = waiting(folder)
    program = wait_for(lambda: forked(folder, caller.pid)[1:], "the program")[0]
    os.kill(program, signal.SIGKILL)
    assert caller.wait(60) == -signal.SIGKILL


def test_program_ends_with_its_caller(folder: Path) -> None:
    caller = waiting(folder)
    wait_for(lambda: forked(folder, caller.pid)[1:], "the program")
    caller.kill()
    caller.wait()
    wait_for(lambda: not forked(folder, caller.pid), "its end")
