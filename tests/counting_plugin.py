"""A plugin of pydantic that writes down every value that is parsed, in whatever process.

`installed` makes it known to processes that are started with its environment.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

NAMES = ("JobSpec", "QuantizationConfig", "Plan")
LOG = "BITMILL_TEST_COUNTS"


def installed(folder: Path) -> dict[str, str]:
    """Environment with the plugin, which writes to `folder/counts`."""
    info = folder / "counting_plugin-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pydantic]\ncounting = counting_plugin:PLUGIN\n")
    path = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path), LOG: str(folder / "counts")}


def read(folder: Path) -> list[dict[str, Any]]:
    """What was parsed: pid, the process's arguments, the type and where the value came from."""
    return [json.loads(line) for line in (folder / "counts").read_text().splitlines()]


class Plugin:
    """Told of every validator that pydantic makes."""

    def new_schema_validator(
        self, schema: Any, schema_type: Any, path: Any, kind: str, *_: Any
    ) -> tuple[Any, Any, Any]:
        names = [name for name in NAMES if path.name.rpartition(".")[2] == name]
        if not names or LOG not in os.environ:
            return None, None, None
        return Handler(names[0], kind, "python"), Handler(names[0], kind, "json"), None


class Handler:
    """Writes a line when a value is about to be validated."""

    def __init__(self, name: str, kind: str, how: str) -> None:
        self.line = {"name": name, "kind": kind, "how": how}

    def on_enter(self, *_: Any, **given: Any) -> None:
        own = {
            "pid": os.getpid(),
            "argv": sys.orig_argv[1:5],
            "made": bool(given.get("self_instance")),
        }
        frame = sys._getframe(1)
        where = []
        while frame and len(where) < 6:
            where.append(f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}")
            frame = frame.f_back
        with open(os.environ[LOG], "a") as log:
            log.write(json.dumps(self.line | own | {"where": where}) + "\n")


PLUGIN = Plugin()
