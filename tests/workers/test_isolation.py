"""A runner without a network, in processes of their own."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

CODE = """
import socket, sys
from bitmill_workers.execution import isolation
how = {how}
try:
    socket.create_connection(("127.0.0.1", {port}), timeout=5)
except OSError as error:
    print(how, "refused")
else:
    print(how, "connected")
"""


def outcome(how: str) -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = CODE.format(how=how, port=server.getsockname()[1])
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
        )
    return run.stdout.strip()


def test_runner_reaches_nobody_once_isolated() -> None:
    assert outcome("'as it is'") == "as it is connected"
    assert outcome("isolation.isolate_network()") in ("namespace refused", "landlock refused")


def test_landlock_alone_refuses_connections() -> None:
    found = outcome("isolation._landlock()")
    if found == "False connected":
        pytest.skip("this kernel has no Landlock network rules")
    assert found == "True refused"
