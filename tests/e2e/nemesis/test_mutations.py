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
        "workers/bitmill_workers/store/leases.py",
        "sa.and_(jobs.c.id == job_id, jobs.c.token == token, jobs.c.state",
        "sa.and_(jobs.c.id == job_id, jobs.c.state",
        "workers/test_leases.py::test_stale_token_writes_nothing[sqlite]",
    ),
    "immediate transaction": (
        "workers/bitmill_workers/store/db.py",
        'raw.execute("BEGIN IMMEDIATE")',
        'raw.execute("BEGIN")',
        "workers/test_concurrency.py::test_a_key_submitted_by_twelve_at_once_makes_one_job[sqlite]",
    ),
    "liveness pipe": (
        "workers/bitmill_workers/execution/child.py",
        '    start_lifeline(request["lease_s"])\n',
        "",
        "workers/test_worker.py::test_stopped_supervisor_is_fenced_when_it_wakes",
    ),
    "more memory after too little": (
        "workers/bitmill_workers/execution/exits.py",
        '    "out_of_memory": Then.LARGER,\n',
        "",
        "workers/test_supervisor.py::test_out_of_memory_goes_to_the_next_tier_once",
    ),
    "class of a stored error": (
        "workers/bitmill_workers/store/records.py",
        '"kind": self.error_kind,',
        '"kind": None,',
        "workers/test_leases.py::test_error_is_stored_whole_and_read_as_its_class[sqlite]",
    ),
    "what a child raised": (
        "quant_core/bitmill/runtime/child.py",
        '    if "error" in last:\n',
        "    if False:\n",
        "quant_core/runtime/test_child.py::test_judgement_of_a_child_arrives_as_it_left",
    ),
    "budget at admission": (
        "quant_core/bitmill/pipeline/admission.py",
        "    check_budget(plan, config)\n",
        "",
        "service/test_hub_headers.py::test_retry_of_a_hub_job_is_checked_as_its_submission_was",
    ),
}


def run_tests(copy: Path, *names: str) -> int:
    """Exit code of tests against the copies of packages that lie in `copy`."""
    folders = [ROOT / folder for folder in ("kernels", "quant_core", "workers", "service")]
    folders = [copy, *folders, ROOT / "tests"]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-o", f"pythonpath={' '.join(map(str, folders))}"),
            f"--basetemp={copy / 'tests'}",
            *(str(ROOT / "tests" / name) for name in names),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))},
        capture_output=True,
        timeout=200,
        check=False,
    )
    # Without the pipe a runner outlives its supervisor, which is what the test is about.
    for pid in processes_of(str(copy / "tests")):
        os.kill(pid, signal.SIGKILL)
    return run.returncode


def package_of(file: str) -> Path:
    return ROOT / Path(*Path(file).parts[:2])


def test_copies_with_all_safeguards_are_green(tmp_path: Path) -> None:
    for package in {package_of(file) for file, *_ in MUTATIONS.values()}:
        shutil.copytree(package, tmp_path / package.name)
    assert run_tests(tmp_path, *(test for *_, test in MUTATIONS.values())) == 0


@pytest.mark.parametrize("name", MUTATIONS)
def test_missing_safeguard_turns_the_suite_red(name: str, tmp_path: Path) -> None:
    file, old, new, test = MUTATIONS[name]
    package = package_of(file)
    shutil.copytree(package, tmp_path / package.name)
    copy = tmp_path / Path(*Path(file).parts[1:])
    text = copy.read_text()
    assert text.count(old) == 1
    copy.write_text(text.replace(old, new))
    assert run_tests(tmp_path, package, test) == 1
