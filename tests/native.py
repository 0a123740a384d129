"""The production stack of `scripts/stack` around a runner that acts on command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from servers import Postgres, Redis
from stores import alive

ROOT = Path(__file__).parents[1]


@contextmanager
def native_stack(folder: Path, **environment: str) -> Iterator[dict[str, Any]]:
    """A running stack on `folder/models`: its addresses and process ids."""
    nginx = shutil.which("nginx") or Path("/usr/sbin/nginx").exists()
    if not (Redis.program and Postgres.programs and nginx):
        pytest.skip("needs the Debian packages redis-server, postgresql and nginx-light")
    command = [str(ROOT / "scripts" / "stack"), "--models", f"models={folder / 'models'}"]
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [*command, "--data", str(folder / "data"), "--runner", "acting_runner"],
        env=os.environ | {"PYTHONPATH": path, "BITMILL_POLL_S": "0.1"} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    found = json.loads(process.stdout.readline())
    try:
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()
    assert not [name for name, pid in found["pids"].items() if alive(pid)]
