"""A plugin of pydantic that writes down every value that is parsed, in whatever process.

`installed` makes it known to processes that are started with its environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

NAMES = ("JobSpec", "QuantizationConfig", "QuantizeRequest", "Plan")
LOG = "BITMILL_TEST_COUNTS"


def installed(folder: Path) -> dict[str, str]:
    """Environment with the plugin, which writes to `folder/counts`."""
    info = folder / "counting_plugin-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: counting-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pydantic]\ncounting = counting_plugin:PLUGIN\n")
    path = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(path), LOG: str(folder / "counts")}


def counts(folder: Path) -> dict[str, Counter[str]]:
    """Word of the process's command line -> what it did -> how often.

    What: "JobSpec parsed" of JSON, decoded or not, "Plan made" of a constructor's arguments.
    """
    found: dict[str, Counter[str]] = {}
    for line in (folder / "counts").read_text().splitlines():
        one = json.loads(line)
        words = one["argv"]
        who = next(word for word in (*words[words.index("-m") + 2 :], words[words.index("-m") + 1]))
        found.setdefault(f"{who} {one['pid']}", Counter())[one["what"]] += 1
    return {who.partition(" ")[0]: counted for who, counted in found.items()}


class Plugin:
    """Told of every validator that pydantic makes."""

    def new_schema_validator(
        self, schema: Any, schema_type: Any, path: Any, kind: str, *_: Any
    ) -> tuple[Any, Any, Any]:
        name = path.name.rpartition(".")[2]
        if name not in NAMES or LOG not in os.environ:
            return None, None, None
        return Handler(name), Handler(name), None


class Handler:
    """Writes a line when a value is about to be validated."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_enter(self, *_: Any, **given: Any) -> None:
        what = f"{self._name} {'made' if given.get('self_instance') else 'parsed'}"
        line = json.dumps({"pid": os.getpid(), "argv": sys.orig_argv, "what": what})
        with open(os.environ[LOG], "a") as log:
            log.write(line + "\n")


PLUGIN = Plugin()
