"""What only transformers knows of a config.json, asked in a process of its own with a deadline.

This process loads no torch. Answers are kept, because they depend on the config alone; one process
runs at a time, because each takes a core and several hundred megabytes for seconds. On a machine
that is too busy for an answer the same config is not asked about again for a minute.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from typing import Any

from bitmill.errors import ModelError
from bitmill.io.atomic import sha256_json

_KEPT = 512
_PAUSE_S = 60.0
_ONE_AT_A_TIME = threading.Lock()
_answers: OrderedDict[str, dict[str, str] | None] = OrderedDict()
_late: OrderedDict[str, tuple[float, float]] = OrderedDict()
"""Configs without an answer: how long it was waited for, and until when that is enough."""


def ask_transformers(settings: Mapping[str, Any], seconds: float) -> str | None:
    """Raise `ModelError` where transformers builds no such model, or another than is planned.

    settings: a sanitized config.json. Returns None where it does, else why it could not be heard:
    nothing came within `seconds`, or torch is not installed here. 0 seconds ask nothing.
    """
    if seconds == 0:
        return None
    if not _torch_is_here():
        return _unheard("it is not installed beside the API")
    key = sha256_json(settings)
    end = time.monotonic() + seconds
    if not _ONE_AT_A_TIME.acquire(timeout=seconds):
        return _unheard(f"it was busy for {seconds:g} s")
    try:
        if key not in _answers:
            waited, until = _late.get(key, (0.0, 0.0))
            if seconds <= waited and time.monotonic() < until:
                return _unheard(f"it gave no answer within {waited:.0f} s a moment ago")
            problem = _ask(settings, max(0.001, end - time.monotonic()))
            if isinstance(problem, str):
                _late[key] = seconds, time.monotonic() + _PAUSE_S
                while len(_late) > _KEPT:
                    _late.popitem(last=False)
                return _unheard(problem)
            _answers[key] = problem
        _answers.move_to_end(key)
        while len(_answers) > _KEPT:
            _answers.popitem(last=False)
        refusal = _answers[key]
    finally:
        _ONE_AT_A_TIME.release()
    if refusal is not None:
        raise ModelError(refusal["message"], code=refusal["code"], param=refusal["param"])
    return None


@cache
def _torch_is_here() -> bool:
    return importlib.util.find_spec("torch") is not None


def _ask(settings: Mapping[str, Any], seconds: float) -> dict[str, str] | str | None:
    """None where the config is good, the refusal, or in words why there is no answer."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "bitmill.models.skeleton"],
            input=json.dumps(settings),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it gave no answer within {seconds:.0f} s"
    except OSError as error:
        return f"its process could not be started ({error.strerror})"
    if done.returncode == 0:
        return None
    try:
        refusal: dict[str, str] = json.loads(done.stdout)
    except ValueError:
        return f"its process ended with exit code {done.returncode}"
    return refusal


def _unheard(why: str) -> str:
    return f"transformers was not asked whether it builds this config.json: {why}; the job will ask"
