"""A function of a test in a process of its own, or on ranks, forked where the session's
`sys.executable` is the script of `warm_python.py`.

    python -m rank_function FILE NAME DEVICE ARGUMENT...
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bitmill.runtime.launch import as_rank, is_rank, run_ranks


def in_process(
    function: Callable[..., object], *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Call `function(*arguments)` in a process; arguments arrive as strings.

    function: of a module's own, which is run again there.
    """
    command = [sys.executable, *_call(function, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


def on_ranks(
    count: int, function: Callable[..., object], *arguments: object, device: str = "cpu"
) -> None:
    """Call `function(group, *arguments)` on every rank; see above. On "cuda" each rank has made a
    GPU of its own the current one."""
    run_ranks(count, _call(function, arguments, device))


def _call(
    function: Callable[..., object], arguments: tuple[object, ...], device: str = "cpu"
) -> list[str]:
    code = function.__code__
    file = str(Path(code.co_filename).resolve())
    return ["-m", "rank_function", file, code.co_name, device, *map(str, arguments)]


if __name__ == "__main__":
    path, name, where, *texts = sys.argv[1:]
    called = runpy.run_path(path)[name]
    if is_rank():
        with as_rank(where) as (group, _):
            called(group, *texts)
    else:
        called(*texts)
