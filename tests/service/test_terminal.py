"""What commands show on a terminal, into a pipe, and to a shell that completes words."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bitmill.errors import NumericalError
from bitmill_service.cli.progress import JobWatch, duration
from bitmill_service.client.client import Client
from finished import Stack
from stores import claim, wait_for

ROOT = Path(__file__).resolve().parents[2]
MAIN = [sys.executable, "-P", "-m", "bitmill_service.cli.main"]
_CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


# Workers of pytest-xdist have these (findings/readline-fixes-the-terminal-size-of-children.sh), and
# they would outweigh the terminal's own size.
_WITHOUT_SIZE = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}


class Terminal:
    """A program on a terminal of its own, whose size can change."""

    def __init__(self, command: list[str], columns: int, env: dict[str, str] | None = None) -> None:
        self.main, below = pty.openpty()
        self._output = b""
        self.resize(columns)
        self.process = subprocess.Popen(
            command,
            stdin=below,
            stdout=below,
            stderr=below,
            start_new_session=True,
            env=_WITHOUT_SIZE | {"TERM": "xterm"} | (env or {}),
            preexec_fn=_own_terminal,
        )
        os.close(below)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.main, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))

    def read(self) -> str:
        """All output so far."""
        while select.select([self.main], [], [], 0)[0]:
            try:
                piece = os.read(self.main, 1 << 16)
            except OSError:  # it has ended
                break
            if not piece:
                break
            self._output += piece
        return self._output.decode("utf-8", "replace")


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def on_terminal(command: list[str], columns: int) -> Iterator[Terminal]:
    terminal = Terminal(command, columns)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait(60)
        os.close(terminal.main)


def lines(text: str) -> list[str]:
    return [_CODES.sub("", line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("bitmill swee", "sweep"),
        ("bitmill workers pa", "pause"),
        ("bitmill submit --max-lo", "--max-loss"),
    ],
)
def test_bash_completes_commands_and_options(words: str, found: str) -> None:
    env = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(
        MAIN,
        env=os.environ | env | {"_BITMILL_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found in done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_shown_for_every_shell(shell: str) -> None:
    env = {"_BITMILL_COMPLETE": f"source_{shell}"}
    done = subprocess.run(MAIN, env=os.environ | env, capture_output=True, text=True, check=True)
    assert "_BITMILL_COMPLETE" in done.stdout


def test_an_interrupt_while_modules_load_ends_quietly() -> None:
    """It comes when the command line is looked for, before that can handle it."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["bitmill"].partition(":")
    code = (
        "import os, signal, sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'bitmill_service.cli.main':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        f"from {module} import {function} as run\n"
        "run()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_plain_lines_tell_rate_and_time_left() -> None:
    out, times = io.StringIO(), iter(range(0, 1000, 10))
    watch = JobWatch(Console(file=out, width=100), clock=lambda: float(next(times)))
    with watch:
        for done in range(5):
            data = {"stage": "refine", "done": done, "total": 30, "unit": "block"}
            watch.show("progress", data)
    shown = out.getvalue().splitlines()
    assert shown[:2] == ["refine: 0/30 block", "refine: 1/30 block"]
    assert shown[4] == "refine: 4/30 block, 20.0 s each, 9 min left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7 s"), (119, "119 s"), (600, "10 min"), (9000, "2 h 30 min")]
)
def test_times_are_said_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bars_fit_a_terminal_that_becomes_narrow() -> None:
    code = (
        "import sys, time\n"
        "from rich.console import Console\n"
        "from bitmill_service.cli.progress import JobWatch\n"
        "with JobWatch(Console(stderr=True)) as watch:\n"
        "    for done in range(9999):\n"
        "        watch.show('progress', dict(stage='x', done=done, total=9999, unit='block'))\n"
        "        time.sleep(0.02)\n"
    )
    with on_terminal([sys.executable, "-c", code], columns=120) as terminal:
        wait_for(lambda: "left" in terminal.read(), "a time left")
        assert widest(terminal) > 50
        terminal.resize(50)
        wait_for(lambda: widest(terminal) <= 50, "bars that fit")
        assert terminal.process.poll() is None


def widest(terminal: Terminal) -> int:
    """Characters of the longest among the three newest whole lines."""
    newest = lines(terminal.read()[-3000:])[-4:-1]
    assert newest
    return max(map(len, newest))


def test_top_shows_jobs_and_workers_once_into_a_pipe(stack: Stack, command: Any) -> None:
    running, waiting = stack.running(), stack.queued()
    catalog = stack.context.catalog
    catalog.beat("w-1", host="h", queues=("cpu",), device="cpu", version="1")
    catalog.beat(
        "w-2",
        host="h",
        queues=("gpu-80",),
        device="cuda",
        version="1",
        memory=(7 * 10**9, 8 * 10**10),
    )
    code, out, _ = command("top", "--url", stack.url)
    assert code == 0
    for told in (running.id, waiting.id, "w-1", "1 live", "models/tiny", "3 code bits"):
        assert told in out
    assert re.search(r"w-1 +idle +cpu +none +cpu", out)
    assert re.search(r"w-2 +idle +cuda +7.0 GB free of 80.0 GB +gpu-80", out)
    assert re.search(r"cpu +1 +1 +open", out)
    assert re.search(r"gpu-80 +0 +0 +open", out)
    assert "gpu-24" not in out
    code, out, _ = command("top", "--url", stack.url, "--json")
    found = json.loads(out)
    assert [job["id"] for job in found["live"]] == [running.id]
    shown = {one["name"]: one["device_free"] for one in found["workers"]["workers"]}
    assert shown == {"w-1": None, "w-2": 7 * 10**9}


def test_top_renews_itself_on_a_terminal_until_it_is_interrupted(stack: Stack) -> None:
    words = ["top", "--interval", "0.5", "--url", stack.url]
    with on_terminal([*MAIN, *words], columns=140) as terminal:
        wait_for(lambda: "queued" in terminal.read(), "the first look")
        job = stack.queued().id
        terminal.resize(90)
        wait_for(lambda: job in terminal.read(), "a job that came later")
        os.killpg(terminal.process.pid, signal.SIGINT)
        assert terminal.process.wait(60) == 130
        assert "\x1b[?1049l" in terminal.read(), "the screen was given back"


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("words", ["wait", "submit --wait", "sweeps wait"])
def test_who_interrupts_waiting_is_told_that_it_goes_on(
    stack: Stack, command: Any, monkeypatch: pytest.MonkeyPatch, words: str, form: list[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "wait", interrupt)
    monkeypatch.setattr(Client, "sweep_events", interrupt)
    sweep = words == "sweeps wait"
    name = stack.sweep(seed=[0]) if sweep else stack.queued().id
    submits = words == "submit --wait"
    asked = ["path:models/tiny", "--code-bits", "3", "--method", "uniform"] if submits else [name]
    code, out, err = command(*words.split(), *asked, "--url", stack.url, *form)
    if submits:
        name = stack.context.jobs.list().jobs[0].id
    begin, at = ("bitmill sweeps" if sweep else "bitmill"), f"--url={stack.url}"
    told = (
        f"{'sweep' if sweep else 'job'} {name} goes on: `{begin} wait {name} {at}` follows it, "
        f"`{begin} cancel {name} {at}` ends it"
    )
    assert code == 130
    assert (json.loads(err)["error"]["message"] if form else err.strip().splitlines()[-1]) == told
    assert not form or out == ""


def test_a_sweep_tells_each_cell_that_ends_into_a_pipe(
    stack: Stack, client: Client, command: Any
) -> None:
    sweep = stack.sweep(seed=[0, 1])
    jobs = [job.id for job in stack.context.sweeps.cells(sweep).values()]
    client.cancel(jobs[0])
    again = client.retry(jobs[0]).id
    client.cancel(jobs[1])
    client.cancel(again)
    code, out, told = command("sweeps", "wait", sweep, "--url", stack.url)
    assert (code, told.splitlines()) == (0, ["cell 1 of 2 cancelled", "cell 2 of 2 cancelled"])
    assert out.count("cancelled") == 2
    code, out, told = command("sweeps", "wait", sweep, "--url", stack.url, "--json")
    assert (told, [row["state"] for row in json.loads(out)]) == ("", ["cancelled"] * 2)


def test_a_table_of_cells_shows_what_each_does_until_the_last_has_ended(
    stack: Stack, client: Client
) -> None:
    sweep = stack.sweep(seed=list(range(60)))
    jobs = [job.id for job in stack.context.sweeps.cells(sweep).values()]
    with on_terminal([*MAIN, "sweeps", "wait", sweep, "--url", stack.url], 80) as terminal:
        wait_for(lambda: "60 queued" in terminal.read(), "the first look")
        assert "seed" in terminal.read()
        job = claim(stack.leases, jobs[49])
        progress = {"stage": "refine", "done": 7, "total": 30, "unit": "block"}
        assert stack.leases.report(job.id, job.token, [("progress", progress)])
        # It has room for 27 cells, and those that run come before those that wait.
        wait_for(lambda: re.search(r"50 +49 +running +refine 7/30 block", terminal.read()), "it")
        assert stack.leases.fail(job.id, job.token, NumericalError("no luck"))
        wait_for(lambda: re.search(r"50 +49 +failed +no luck", terminal.read()), "its error")
        client.cancel_sweep(sweep)
        wait_for(lambda: terminal.process.poll() is not None, "the end")
        assert terminal.process.returncode == 3
        assert "59 cancelled, 1 failed" in terminal.read()
        assert widest(terminal) <= 80
