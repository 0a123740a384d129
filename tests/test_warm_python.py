"""Children that are forked tell, die and are ended as those that are started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from bitmill.errors import BitmillError
from bitmill.runtime.child import run_child
from stores import processes_of, wait_for
from warm_python import FORKED, OF_RANKS, PYTHON, warm_python


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With a server, once the first program has ended."""
    folder = tmp_path_factory.mktemp("warm")
    with warm_python(folder, os.getpid()):
        end_of(folder)
        yield folder
        for pid in processes_of(str(folder)):
            os.kill(pid, signal.SIGKILL)


def end_of(folder: Path) -> dict[str, object]:
    with pytest.raises(BitmillError) as ended:
        run_child("the check", ["-m", "bitmill", "nothing", str(folder / "nothing.json")])
    return ended.value.to_dict()


def waiting(folder: Path, *options: str, **more: str) -> subprocess.Popen[bytes]:
    """A program that reads what nobody writes."""
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    environment = os.environ | {"PYTHONSAFEPATH": "1"} | more
    command = [sys.executable, *options, "-m", "bitmill", "verify", str(folder / "pipe")]
    return subprocess.Popen(command, env=environment)


def forked(folder: Path) -> list[int]:
    """What the server forked: processes that oversee programs, and the programs."""
    parents = {pid: parent(pid) for pid in processes_of(str(folder))}
    return [pid for pid in parents if parents[pid] in parents]


def programs(folder: Path) -> list[int]:
    overseers = forked(folder)
    return [pid for pid in overseers if parent(pid) in overseers]


def parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def test_forked_program_tells_what_a_started_one_tells(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = end_of(folder)
    monkeypatch.setattr(sys, "executable", PYTHON)
    assert end_of(folder) == warm


def test_ranks_are_forked(folder: Path) -> None:
    """As torch's launcher starts them, from the same server."""
    rank = waiting(folder, "-P", LOCAL_RANK="0", **{OF_RANKS: "1"})
    wait_for(lambda: programs(folder), "the rank")
    rank.kill()
    rank.wait()
    wait_for(lambda: not forked(folder), "its end")
    assert len(list(folder.glob("server-*"))) == 1


def test_files_arrive_under_their_numbers(folder: Path) -> None:
    """A runner that is asked for nothing says so on its pipe and in its log."""
    (folder / "request").write_text('{"lease_s": 60}')
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "bitmill_workers.execution.runner"]
    runner = subprocess.Popen(
        [*command, str(folder / "request"), str(writer)],
        pass_fds=(writer,),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(writer)
    with os.fdopen(reader) as told:
        assert json.loads(told.readline())["type"] == "error"
    # Its input is open until it has ended: a runner whose input closes kills its group.
    assert runner.stderr is not None
    assert b"KeyError" in runner.stderr.read()
    assert runner.wait(60) == 1
    runner.communicate()


def test_only_programs_that_are_told_hand_the_script_on(folder: Path) -> None:
    command = [sys.executable, "-c", "import sys, numpy; print(sys.executable)"]

    def said(**more: str) -> str:
        environment = os.environ | more
        return subprocess.run(command, env=environment, capture_output=True, text=True).stdout

    assert said(**FORKED).strip() == sys.executable
    assert said().strip() == str(Path(sys.prefix) / "bin" / "python")


def test_such_a_program_sees_the_packages_that_others_see(folder: Path) -> None:
    program = "import os, sys; print([os.path.realpath(path) for path in sys.path])"

    def seen(python: str) -> str:
        command = [python, "-P", "-c", program]
        return subprocess.check_output(command, env=os.environ | FORKED, text=True)

    assert seen(sys.executable) == seen(PYTHON)


def test_killed_program_is_seen_as_killed(folder: Path) -> None:
    caller = waiting(folder)
    program = wait_for(lambda: programs(folder), "the program")[0]
    os.kill(program, signal.SIGKILL)
    assert caller.wait(60) == -signal.SIGKILL


def test_program_ends_with_its_caller(folder: Path) -> None:
    caller = waiting(folder)
    wait_for(lambda: programs(folder), "the program")
    caller.kill()
    caller.wait()
    wait_for(lambda: not forked(folder), "its end")
