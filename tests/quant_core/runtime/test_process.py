"""Settings of processes: for good in our own, for a while in a caller's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitmill.runtime.process import (
    SWITCH_S,
    computing,
    deterministic,
    environment,
    settle_own_process,
)

OWN = ("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OWN:
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


def test_the_environments_own_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    settle_own_process()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    settle_own_process()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def state() -> dict[str, Any]:
    backends: Any = torch.backends
    return {
        "threads": torch.get_num_threads(),
        "switch": sys.getswitchinterval(),
        "cuda": backends.cuda.matmul.fp32_precision,
        "mkldnn": backends.mkldnn.matmul.fp32_precision,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "random": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
    }


def test_settings_hold_within_and_are_taken_back() -> None:
    before = state()
    with computing(threads=3):
        assert torch.get_num_threads() == 3
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        assert not torch.backends.cuda.matmul.allow_tf32
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    assert state() == before


def test_settings_are_taken_back_after_an_error() -> None:
    before = state()
    with pytest.raises(ValueError, match="inside"), computing(threads=2):
        raise ValueError("inside")
    assert state() == before


def old_switch() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def old_precision() -> None:
    torch.set_float32_matmul_precision("medium")


def one_backend() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


PRECISIONS: dict[str, Callable[[], None]] = {
    "allow_tf32": old_switch,
    "set_float32_matmul_precision": old_precision,
    "fp32_precision": one_backend,
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_products_are_exact_within_however_the_caller_asked_for_speed(name: str) -> None:
    """In a process of its own: torch tells of a mixture of its settings once and for all."""
    code = (
        "from test_process import *\n"
        f"PRECISIONS[{name!r}]()\n"
        "before = state()\n"
        "with computing():\n"
        "    within = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32\n"
        "    assert within == ('highest', False), within\n"
        "    assert torch.backends.mkldnn.matmul.fp32_precision == 'ieee'\n"
        "assert state() == before\n"
    )
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr


def test_variables_of_others_stay_as_they_became() -> None:
    with environment({"BITMILL_ONE": "1"}):
        assert os.environ["BITMILL_ONE"] == "1"
        os.environ["BITMILL_TWO"] = "2"
    assert "BITMILL_ONE" not in os.environ
    assert os.environ.pop("BITMILL_TWO") == "2"


@pytest.mark.parametrize("warn_only", [True, False])
def test_learning_leaves_deterministic_kernels_as_they_were(warn_only: bool) -> None:
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        before = state()
        with deterministic():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert state() == before
    finally:
        torch.use_deterministic_algorithms(False)
