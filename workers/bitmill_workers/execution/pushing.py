"""Sends a finished job's files to the Hub: a child of the supervisor, with a network and a token.

Passing faults are waited out as a download waits for them; what has arrived is not sent again.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitmill.config.quantization import Calibration
from bitmill.errors import ResourceError
from bitmill.library.push import push
from bitmill.results import QualityReport
from bitmill_workers.execution.child import Emit, serve

TOKEN = "BITMILL_PUSH_TOKEN"  # the name of the variable that holds it


def send(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Push the folder, tell bytes, and return where it lies now."""

    def on_bytes(done: int, total: int) -> None:
        progress = {"kind": "progress", "stage": "publish", "done": done, "total": total}
        emit({"type": "progress", "unit": "byte", **progress})

    def repeat(what: str, step: Callable[[], Any]) -> Any:
        start, attempt = time.monotonic(), 0
        while True:
            try:
                return step()
            except ResourceError as error:
                pause = min(30.0, 0.5 * 2.0**attempt) * random.uniform(0.5, 1.0)
                gone = error.code != "hub_unavailable"
                if gone or time.monotonic() - start + pause > request["hub_patience_s"]:
                    raise
                message = f"{error.message}; next try in {pause:.1f} s"
                emit(
                    {"type": "progress", "kind": "warning", "stage": "publish", "message": message}
                )
                time.sleep(pause)
                attempt = min(attempt + 1, 6)

    report, calibration = request["report"], request["calibration"]
    pushed = push(
        request["folder"],
        request["repo_id"],
        token=os.environ.pop(TOKEN),
        private=request["private"],
        base_model=request["base_model"],
        license=request["license"],
        calibration=calibration and Calibration.model_validate(calibration),
        report=report and QualityReport.load(Path(report)),
        endpoint=request["hub_endpoint"],
        repeat=repeat,
        on_bytes=on_bytes,
    )
    return {"result": pushed.model_dump(mode="json")}


if __name__ == "__main__":
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
    sys.exit(serve(sys.argv[1:], send))
