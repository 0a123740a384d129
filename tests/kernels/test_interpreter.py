"""Triton kernels on CPU: all files of cases run in one process with TRITON_INTERPRET=1.

Triton chooses between compiler and interpreter when a kernel's module is imported, so the cases
cannot share this process.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("triton")
NUMPY_WARNINGS = (
    "ignore:Conversion of an array:DeprecationWarning",  # the interpreter's own
    "ignore:overflow encountered:RuntimeWarning",  # padding lanes hold whatever memory held
    "ignore:invalid value encountered:RuntimeWarning",
)
FILES = sorted(Path(__file__).parent.glob("interpreter_*.py"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Failed cases by file, of all files that have cases; what the process printed."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    report = tmp_path_factory.mktemp("cases") / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    options += [part for warning in NUMPY_WARNINGS for part in ("-W", warning)]
    command = [sys.executable, "-m", "pytest", *options, *map(str, FILES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert report.exists(), done.stdout[-4000:] + done.stderr[-2000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        failed = found.setdefault(case.get("classname").rsplit(".", 1)[-1], [])
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(case.get("name"))
    return found, done


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_cases_pass_in_the_interpreter(name, outcomes):
    found, done = outcomes
    assert found[name] == [], done.stdout[-8000:]
    assert done.returncode in (0, 1)
