"""Processes of a job and their ends, with real processes that really die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bitmill.errors import BitmillError, ProcessFailed, ResourceError, VerificationError
from bitmill.runtime.child import death, run_child

CHILD = """
import ctypes, os, resource, signal, sys
from bitmill.errors import VerificationError
from bitmill.runtime.child import as_child
with as_child() as tell:
    print("noise on standard output")
    {act}
    tell(result={{"sum": 3}})
"""


def end_of(act: str) -> BitmillError:
    with pytest.raises(BitmillError) as ended:
        run_child("the check", ["-c", CHILD.format(act=act)])
    return ended.value


def test_messages_come_as_they_are_told_and_the_result_last(
    capfd: pytest.CaptureFixture[str],
) -> None:
    heard: list[dict[str, Any]] = []
    act = "tell(text='Mühle\\n'); tell(text='b')"
    found = run_child("the check", ["-c", CHILD.format(act=act)], heard.append)
    assert (found, heard) == ({"sum": 3}, [{"text": "Mühle\n"}, {"text": "b"}])
    assert capfd.readouterr() == ("", "noise on standard output\n")


@pytest.mark.parametrize("heeds", [True, False])
def test_parent_that_stops_listening_ends_the_child(tmp_path: Path, heeds: bool) -> None:
    ignore = "" if heeds else "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    act = f"{ignore}tell(pid=os.getpid()); signal.pause()"
    heard: list[dict[str, Any]] = []

    def stop(message: dict[str, Any]) -> None:
        heard.append(message)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child("the check", ["-c", CHILD.format(act=act)], stop)
    assert not _runs(heard[0]["pid"])


def test_end_without_a_result_is_a_death() -> None:
    error = end_of("os._exit(0)")
    assert (type(error), error.message) == (ProcessFailed, "the check ended with exit code 0")


def test_judgement_of_a_child_arrives_as_it_left(capfd: pytest.CaptureFixture[str]) -> None:
    act = "raise VerificationError('codes differ', code='c', param='layer', hint='Look.')"
    error = end_of(act)
    assert type(error) is VerificationError
    found = (error.message, error.code, error.param, error.hint)
    assert found == ("codes differ", "c", "layer", "Look.")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("act", "kind", "code", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", ResourceError, "killed", "signal 9 (SIGKILL)"),
        ("os.kill(os.getpid(), signal.SIGTERM)", ResourceError, "killed", "signal 15 (SIGTERM)"),
        ("os.kill(os.getpid(), signal.SIGXCPU)", ResourceError, "killed", "signal 24 (SIGXCPU)"),
        ("ctypes.string_at(0)", ProcessFailed, "process_failed", "signal 11 (SIGSEGV)"),
        ("os.abort()", ProcessFailed, "process_failed", "signal 6 (SIGABRT)"),
        (
            "os.write(2, b'terminate called after an instance of std::bad_alloc\\n'); os.abort()",
            ResourceError,
            "out_of_memory",
            "signal 6 (SIGABRT): terminate called after",
        ),
        (
            "os.write(2, b'memory allocation of 4096 bytes failed\\n' + b'x' * 9999); os.abort()",
            ResourceError,
            "out_of_memory",
            "memory allocation of 4096 bytes failed",
        ),
        (
            "os.write(2, b'std::bad_alloc\\n' + b'line\\n' * 99999); os.abort()",
            ProcessFailed,
            "process_failed",
            "signal 6 (SIGABRT)",
        ),
        (
            "os.write(2, b'std::bad_alloc\\n'); ctypes.string_at(0)",
            ProcessFailed,
            "process_failed",
            "signal 11 (SIGSEGV)",
        ),
        ("os._exit(128 + 15)", ResourceError, "killed", "signal 15 (SIGTERM)"),
        ("os._exit(3)", ProcessFailed, "process_failed", "exit code 3"),
        ("bytearray(1 << 60)", ResourceError, "out_of_memory", "memory ran out"),
        (
            "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); bytearray(2 << 30)",
            ResourceError,
            "out_of_memory",
            "memory ran out",
        ),
        ("open('/dev/full', 'w').write('x' * 99999)", ResourceError, "disk_full", "no space"),
        ("raise ValueError('a bug')", ProcessFailed, "internal", "ValueError: a bug"),
    ],
)
def test_death_that_is_no_judgement_is_told_as_what_it_is(
    act: str, kind: type[BitmillError], code: str, words: str
) -> None:
    error = end_of(act)
    assert (type(error), error.code) == (kind, code)
    assert words in error.message
    assert "verif" not in error.message


def test_trace_of_a_fault_stays_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    end_of("raise ValueError('a bug')")
    assert "Traceback" in capfd.readouterr().err


def test_program_that_cannot_start_is_a_fault() -> None:
    with pytest.raises(ProcessFailed, match="the check ended with exit code 1"):
        run_child("the check", ["-m", "bitmill.no_such_module"])


def test_child_ends_with_its_parent(tmp_path: Path) -> None:
    act = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); signal.pause()"
    code = "import sys; from bitmill.runtime.child import run_child; "
    code += "run_child('the check', ['-c', sys.argv[1]])"
    parent = subprocess.Popen([sys.executable, "-c", code, CHILD.format(act=act)])
    limit = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < limit
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    while _runs(child):
        assert time.monotonic() < limit
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_signals_without_a_name_and_codes_of_ones_own() -> None:
    assert "signal 50 (unknown)" in death("it", -50).message
    assert death("it", -signal.SIGBUS, code="rank_failed").code == "rank_failed"
    assert death("it", -signal.SIGKILL, code="rank_failed").code == "killed"
    for status in (os.EX_OK, 128, 255):
        assert death("it", status).message == f"it ended with exit code {status}"
