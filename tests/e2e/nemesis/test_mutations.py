"""The suite notices when a safeguard is missing: each is taken out of a copy of the package."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stores import processes_of

ROOT = Path(__file__).parents[3]

MUTATIONS = {
    "token predicate": (
        "store/leases.py",
        "sa.and_(jobs.c.id == job_id, jobs.c.token == token, jobs.c.state",
        "sa.and_(jobs.c.id == job_id, jobs.c.state",
        "test_leases.py::test_stale_token_writes_nothing[sqlite]",
    ),
    "immediate transaction": (
        "store/db.py",
        'raw.execute("BEGIN IMMEDIATE")',
        'raw.execute("BEGIN")',
        "test_concurrency.py::test_a_key_submitted_by_twelve_at_once_makes_one_job[sqlite]",
    ),
    "liveness pipe": (
        "execution/child.py",
        '    start_lifeline(request["lease_s"])\n',
        "",
        "test_worker.py::test_stopped_supervisor_is_fenced_when_it_wakes",
    ),
}


def run_tests(package: Path, name: str) -> int:
    """Exit code of one test against the `bitmill_workers` in `package`."""
    folders = [ROOT / "kernels", ROOT / "quant_core", package, ROOT / "service", ROOT / "tests"]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-o", f"pythonpath={' '.join(map(str, folders))}"),
            f"--basetemp={package / 'tests'}",
            str(ROOT / "tests" / "workers" / name),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        timeout=200,
        check=False,
    )
    # Without the pipe a runner outlives its supervisor, which is what the test is about.
    for pid in processes_of(str(package / "tests")):
        os.kill(pid, signal.SIGKILL)
    return run.returncode


@pytest.mark.parametrize("name", MUTATIONS)
def test_missing_safeguard_turns_the_suite_red(name: str, tmp_path: Path) -> None:
    file, old, new, test = MUTATIONS[name]
    package = tmp_path / "bitmill_workers"
    shutil.copytree(ROOT / "workers" / "bitmill_workers", package)
    assert run_tests(tmp_path, test) == 0
    text = (package / file).read_text()
    assert text.count(old) == 1
    (package / file).write_text(text.replace(old, new))
    assert run_tests(tmp_path, test) == 1
