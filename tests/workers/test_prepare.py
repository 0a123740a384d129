"""Programs of a deployment whose database cannot be used end with one line of their log."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from servers import free_port


@pytest.mark.parametrize("program", ["prepare", "worker"])
@pytest.mark.parametrize("database", ["away", "no database"])
def test_a_database_that_cannot_be_used_is_told_in_one_line(
    tmp_path: Path, program: str, database: str
) -> None:
    url = f"postgresql+psycopg://bitmill:canary@127.0.0.1:{free_port()}/bitmill"
    if database != "away":
        (tmp_path / "jobs.db").write_text("a text that is longer than the head of a database" * 9)
        url = f"sqlite:///{tmp_path}/jobs.db"
    env = os.environ | {"BITMILL_DATABASE_URL": url, "BITMILL_DATA": str(tmp_path / "data")}
    command = [sys.executable, "-m", f"bitmill_workers.{program}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    told = json.loads(line)["message"]
    assert re.match(r"the database \S+ cannot be used: .+\. See that it runs", told)
    assert "canary" not in line
