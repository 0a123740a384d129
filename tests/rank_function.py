"""A function of a test on several ranks, `python -m rank_function FILE NAME ARGUMENT...` each.

They are forked where the session's `sys.executable` is the script of `warm_python.py`.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from bitmill.runtime.launch import as_rank, run_ranks


def on_ranks(count: int, function: Callable[..., object], *arguments: object) -> None:
    """Call `function(group, *arguments)` on every rank; arguments arrive as strings.

    function: of a module's own, which is run again in every rank.
    """
    code = function.__code__
    command = ["-m", "rank_function", str(Path(code.co_filename).resolve()), code.co_name]
    run_ranks(count, [*command, *map(str, arguments)])


if __name__ == "__main__":
    file, name, *texts = sys.argv[1:]
    with as_rank("cpu") as (group, _):
        runpy.run_path(file)[name](group, *texts)
