"""Programs that are forked from a warm server tell, die and are ended as those that are started."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from bitmill.errors import BitmillError
from bitmill.runtime import forks
from bitmill.runtime.child import run_child
from bitmill.runtime.warm import WARM, command, warm_library
from stores import wait_for


@pytest.fixture(scope="module")
def server() -> Iterator[psutil.Process]:
    """The one that `run_child` finds meanwhile."""
    with warm_library():
        own = psutil.Process()
        yield wait_for(
            lambda: [one for one in own.children() if "bitmill.runtime.warm" in told(one)],
            "the server",
        )[0]


def told(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def end_of(folder: Path) -> dict[str, object]:
    with pytest.raises(BitmillError) as ended:
        run_child("the check", ["-m", "bitmill", "nothing", str(folder)])
    return ended.value.to_dict()


def programs(server: psutil.Process) -> list[psutil.Process]:
    """Those that run now; one that oversaw an earlier one may go away meanwhile."""
    found = []
    for overseer in server.children():
        with suppress(psutil.NoSuchProcess):
            found += overseer.children()
    return found


@contextmanager
def waiting(
    server: psutil.Process, folder: Path
) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """A caller, which is killed in the end, and its program, which reads what nobody writes."""
    os.mkfifo(folder / "pipe")
    asked = command(["-m", "bitmill", "verify", str(folder / "pipe")])
    with subprocess.Popen(asked) as caller:
        try:
            yield caller, wait_for(lambda: programs(server), "it")[0]
        finally:
            caller.kill()


def test_forked_program_tells_what_a_started_one_tells(
    server: psutil.Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked = end_of(tmp_path)
    assert server.children(), "the one that oversaw it is waited for behind the next"
    monkeypatch.delenv(WARM)
    assert end_of(tmp_path) == forked


def test_killed_program_is_seen_as_killed(server: psutil.Process, tmp_path: Path) -> None:
    with waiting(server, tmp_path) as (caller, program):
        program.kill()
        assert caller.wait(60) == -signal.SIGKILL


def test_a_server_killed_before_it_has_read_is_seen_as_killed(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        asked = [
            sys.executable,
            "-I",
            "-S",
            forks.__file__,
            str(tmp_path / "socket"),
            "-m",
            "bitmill",
        ]
        caller = subprocess.Popen(asked)
        connection, _ = listening.accept()
        select.select([connection], [], [])
        connection.close()
        assert caller.wait(60) == -signal.SIGKILL


def test_program_ends_with_its_caller(server: psutil.Process, tmp_path: Path) -> None:
    with waiting(server, tmp_path) as (caller, program):
        caller.kill()
        caller.wait()
        wait_for(lambda: not program.is_running(), "its end")


def test_without_its_server_a_program_is_started(
    server: psutil.Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WARM, str(tmp_path / "gone"))
    before = server.children()
    assert "exit code 2" in str(end_of(tmp_path)["message"])
    assert server.children() == before


def test_nothing_is_left_of_a_server() -> None:
    before = os.environ.get(WARM)
    with warm_library():
        server = max(psutil.Process().children(), key=lambda one: one.create_time())
        assert os.environ[WARM] != before
    assert not server.is_running()
    assert os.environ.get(WARM) == before
