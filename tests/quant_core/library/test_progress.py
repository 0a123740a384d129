"""How a caller watches a call."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from bitmill.library.progress import watching
from bitmill.pipeline.progress import Progress

EVENTS = """
import sys
from bitmill.library.progress import watching
from bitmill.pipeline.progress import Progress

def run(progress):
    with watching(progress) as watch:
        watch(Progress(kind="stage", stage="profile", state="started"))
        for done in (1, 2, 3):
            watch(Progress(kind="progress", stage="profile", done=done, total=3, unit="block"))
        watch(Progress(kind="warning", stage="profile", message="a starved expert"))
        watch(Progress(kind="stage", stage="profile", state="finished"))
"""
NOTEBOOK = """
import types

class Shell:
    config = {"IPKernelApp": {}}

sys.modules["IPython"] = types.SimpleNamespace(
    get_ipython=Shell, version_info=(9,), __spec__=None
)
"""


def shown(code: str, *, terminal: bool) -> str:
    """What a process writes to standard error."""
    if not terminal:
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == ""
        return done.stderr
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(ours, "rb", buffering=0) as reader:
        child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stderr=theirs)
        os.close(theirs)
        text = b""
        try:
            while piece := reader.read(4096):
                text += piece
        except OSError:  # the other end is closed
            pass
        assert child.wait(60) == 0
    return text.decode()


def test_bars_are_shown_where_somebody_looks() -> None:
    for code, terminal in (
        (EVENTS + "run(None)", True),
        (EVENTS + "run(True)", False),
        (EVENTS + NOTEBOOK + "run(None)", False),
    ):
        text = shown(code, terminal=terminal)
        assert "profile: 100%" in text
        assert "3/3" in text
        assert "warning: a starved expert" in text


def test_nothing_is_shown_where_nobody_looks() -> None:
    assert shown(EVENTS + "run(None)", terminal=False) == ""
    assert shown(EVENTS + "run(False)", terminal=True) == ""


def test_bars_leave_no_thread() -> None:
    code = EVENTS + "import threading\nrun(True)\nassert threading.active_count() == 1"
    shown(code, terminal=False)


def test_a_function_is_told_everything_and_may_end_the_work() -> None:
    event = Progress(kind="warning", stage="plan", message="m")
    told: list[Progress] = []
    with watching(told.append) as watch:
        watch(event)
    assert told == [event]

    def refuse(_: Progress) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"), watching(refuse) as watch:
        watch(event)
