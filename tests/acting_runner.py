"""A runner that acts on command: the real child harness around a job of a few files.

The specification's label says what to do, e.g. "steps=20 sleep=0.05" or "exit=42".
Finished steps leave files in the job's folder, as finished blocks do, so a second attempt can show
that it did not repeat them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bitmill.errors import InputError
from bitmill.io.manifest import write_manifest
from bitmill_workers.execution.child import Emit, serve


def act(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    label = request["label"] or ""
    acts = dict(part.split("=", 1) for part in label.split())
    work, output = Path(request["job_dir"]), Path(request["output_dir"])
    first = not (work / "attempted").exists()
    (work / "attempted").touch()
    _say(f"runner {os.getpid()} starts")
    _note_life(request)
    (work / "pid").write_text(str(os.getpid()))
    if "environment" in acts:
        _say("environment " + " ".join(sorted(os.environ)))
    steps, made = int(acts.get("steps", 3)), 0
    for step in range(steps):
        mark = work / f"step-{step}"
        if not mark.exists():
            time.sleep(float(acts.get("sleep", 0)))
            mark.touch()
            made += 1
        _note_life(request)
        emit(
            {
                "type": "progress",
                "kind": "progress",
                "stage": "refine",
                "done": step + 1,
                "total": steps,
                "unit": "block",
            }
        )
        if step == 0 and (first or "always" in acts):
            _misbehave(acts, request)
    output.mkdir(parents=True)
    (output / "model.safetensors").write_bytes(os.urandom(1000))
    (output / "attempt.txt").write_text("/".join(output.parts[-2:]))
    if "half" in acts:
        return {"result": {}, "profile_id": None}
    write_manifest(output)
    return {"result": {"steps": steps, "made": made}, "profile_id": acts.get("profile")}


def _note_life(request: dict[str, Any]) -> None:
    """Append "job token monotonic-time" to the file that checks for two live runners of a job."""
    output = Path(request["output_dir"])
    lives = Path(request["job_dir"]).parents[2] / "lives"
    if lives.exists():
        line = f"{output.parent.name} {output.name} {time.monotonic():.3f}\n"
        with lives.open("ab", buffering=0) as history:
            history.write(line.encode())


def _kill_supervisor() -> None:
    """SIGKILL the parent, unless it has died and something else has adopted this process."""
    parent = os.getppid()
    if b"bitmill" in Path(f"/proc/{parent}/cmdline").read_bytes():
        os.kill(parent, signal.SIGKILL)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _misbehave(acts: dict[str, str], request: dict[str, Any]) -> None:
    match acts.get("do"):
        case "exit":
            os._exit(int(acts["code"]))
        case "memory":
            bytearray(1 << 60)
        case "refuse":
            raise InputError(
                "calibration text is empty",
                code="invalid_calibration",
                param="text",
                hint="Give a text.",
            )
        case "raise":
            raise ValueError("a bug")
        case "segfault":
            ctypes.string_at(0)
        case "abort":
            os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
            os.abort()
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(3600)
        case "kill-worker":
            _kill_supervisor()
            time.sleep(3600)
        case "grandchild":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
            Path(request["job_dir"], "grandchild").write_text(str(child.pid))
            time.sleep(3600)
        case "fill":
            Path(request["job_dir"], "large").write_bytes(bytes(64 << 20))
        case "chatter":
            for _ in range(50_000):
                _say("x" * 99)


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], act))
