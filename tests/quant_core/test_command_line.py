"""`python -m bitmill`: requests, what it tells, and whom it dies with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitmill.errors import BitmillError, InputError, SpecError
from bitmill.runtime.child import run_child


def program(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "bitmill", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("arguments", [(), ("quantize",), ("dance", "x"), ("bench", "x", "y")])
def test_other_arguments_are_answered_with_the_usage(arguments: tuple[str, ...]) -> None:
    done = program(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: python -m bitmill quantize|evaluate|")


def test_an_error_is_the_last_line_and_all_of_standard_output(tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"folder": str(tmp_path / "none"), "prompt": "a"}))
    done = program("generate", request)
    (line,) = done.stdout.splitlines()
    assert isinstance(BitmillError.from_dict(json.loads(line)["error"]), InputError)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "request_", "param"),
    [
        ("generate", {"folder": "f"}, "prompt"),
        ("generate", {"folder": "f", "prompt": "p", "colour": "red"}, "colour"),
        ("bench", {"folder": "f", "dtype": "float3"}, "dtype"),
        ("quantize", {"model": "m", "out": "o", "work": "w", "config": {"budget": {}}}, "budget"),
    ],
)
def test_a_request_is_refused_by_name(
    tmp_path: Path, command: str, request_: dict[str, Any], param: str
) -> None:
    file = tmp_path / "request.json"
    file.write_text(json.dumps(request_))
    with pytest.raises(SpecError) as refused:
        run_child("it", ["-m", "bitmill", command, str(file)])
    assert param in str(refused.value.param)


def test_a_process_whose_parent_died_before_it_could_look_does_nothing(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    done = program("generate", tmp_path / "request.json", BITMILL_PARENT=str(gone.pid))
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
