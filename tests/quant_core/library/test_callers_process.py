"""A call leaves the caller's process as it was, and the caller's choices have no say in it."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bitmill
from tiny import tinier_llama
from warm_python import FORKED

pytestmark = pytest.mark.e2e

HERE = Path(__file__).parent
QUICK: dict[str, Any] = {
    "bits": 4,
    "text": str(HERE.parent / "calibration.txt"),
    "calibration_sequences": 4,
    "calibration_length": 64,
    "held_out": 1,
    "texts": ("wiki_evaluation",),
    "evaluation_sequences": 1,
    "evaluation_length": 64,
    "threads": 1,
}


def state() -> dict[str, Any]:
    """What a call could change."""
    backends: Any = torch.backends
    root = logging.getLogger()
    return {
        "threads": torch.get_num_threads(),
        "threads between operators": torch.get_num_interop_threads(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "precision": torch.get_float32_matmul_precision(),
        "tf32": [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32],
        "mkldnn": backends.mkldnn.matmul.fp32_precision,
        "cudnn": [backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.enabled],
        "deterministic": [
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            backends and torch.utils.deterministic.fill_uninitialized_memory,
        ],
        "random": [
            torch.get_rng_state().tolist(),
            repr(np.random.get_state()),
            repr(random.getstate()),
        ],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": list(sys.path),
        "warnings": [repr(one) for one in warnings.filters],
        "root logger": [root.level, [repr(one) for one in root.handlers], root.disabled],
        "logging": logging.root.manager.disable,
        "signals": [repr(signal.getsignal(one)) for one in sorted(signal.valid_signals())],
        "running threads": sorted(one.name for one in threading.enumerate()),
        "switch interval": sys.getswitchinterval(),
        "numpy": repr(np.geterr()),
        "hooks": [repr(sys.excepthook), repr(threading.excepthook), repr(warnings.showwarning)],
    }


def changed(before: dict[str, Any]) -> dict[str, Any]:
    now = state()
    return {name: (before[name], now[name]) for name in now if before[name] != now[name]}


def make_odd() -> None:
    """The settings of a caller who works otherwise."""
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_autocast_enabled("cpu", True)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    np.seterr(all="raise")
    warnings.simplefilter("error")
    logging.getLogger().setLevel(logging.DEBUG)
    logging.getLogger().addHandler(logging.NullHandler())
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def call(source: str, out: str, odd: bool) -> None:
    """In a fresh process: what calls change, as JSON, and a last one's result in `out`."""
    if odd:
        make_odd()
    found = {}
    before = state()

    def fail(event: bitmill.Progress) -> None:
        if event.stage == "refine":
            raise LookupError

    for name, asked in {
        "refused": {"bits": 0.5},
        "failed": {"progress": fail},
        "interrupted": {"progress": lambda event: signal.raise_signal(signal.SIGINT)},
        "done": {},
    }.items():
        try:
            bitmill.quantize(source, out=out, **(QUICK | asked))
        except (bitmill.BitmillError, LookupError, KeyboardInterrupt):
            assert name != "done"
        found[name] = changed(before)
    bitmill.evaluate(out, source, texts=("wiki_evaluation",), sequences=1, length=64)
    found["evaluated"] = changed(before)
    bitmill.profile(source, **QUICK)
    found["profiled"] = changed(before)
    print(json.dumps(found))  # noqa: T201


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinier_llama(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bitmill.Result:
    return bitmill.quantize(source, out=tmp_path_factory.mktemp("plain") / "out", **QUICK)


@pytest.mark.parametrize("odd", [False, True], ids=["usual", "odd"])
def test_a_call_changes_nothing_and_nothing_changes_it(
    odd: bool, source: Path, plain: bitmill.Result, tmp_path: Path
) -> None:
    arguments = f"{str(source)!r}, {str(tmp_path / 'out')!r}, {odd}"
    program = (
        f"import sys; sys.path += {[str(HERE), str(HERE.parents[1])]}\n"
        f"from test_callers_process import call; call({arguments})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | FORKED,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {name: {} for name in found}
    assert len(done.stdout.splitlines()) == 1
    for name in ("model.safetensors", "bit_width_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (plain.folder / name).read_bytes()
