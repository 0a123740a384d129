"""Triton kernels on CPU: each file of cases runs in a process with TRITON_INTERPRET=1.

Triton chooses between compiler and interpreter when a kernel's module is imported, so the cases
cannot share this process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
NUMPY_WARNINGS = (
    "ignore:Conversion of an array:DeprecationWarning",  # the interpreter's own
    "ignore:overflow encountered:RuntimeWarning",  # padding lanes hold whatever memory held
    "ignore:invalid value encountered:RuntimeWarning",
)
CASES = sorted(path.name for path in Path(__file__).parent.glob("interpreter_*.py"))


@pytest.mark.parametrize("name", CASES)
def test_cases_pass_in_the_interpreter(name):
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    file = Path(__file__).parent / name
    options = ["-q", "-x", "-p", "no:cacheprovider"]
    options += [part for warning in NUMPY_WARNINGS for part in ("-W", warning)]
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
