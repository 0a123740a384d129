"""The runner: one job's pipeline in a process of its own, without network, secrets or database.

Started by the supervisor as `python -m bitmill_workers.runner <request> <message fd>`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bitmill_workers.child import Emit, serve


def run(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Run the pipeline in local folders, relay its progress and return what it found."""
    from bitmill.pipeline import run_job
    from bitmill.progress import Progress
    from bitmill.spec import parse_spec

    def on_progress(progress: Progress) -> None:
        emit({"type": "progress", **progress.model_dump(mode="json", exclude_none=True)})

    result = run_job(
        parse_spec(request["spec"]),
        Path(request["model_folder"]),
        Path(request["job_dir"]),
        Path(request["output_dir"]),
        gguf=request["gguf"],
        map_file=Path(request["map_file"]) if request["map_file"] else None,
        profile_folder=Path(request["profile_folder"]),
        device=_device(request["device"]),
        on_progress=on_progress,
        should_stop=lambda: False,
    )
    summary = {
        "bytes": result.manifest.total_bytes,
        "quality": result.quality.model_dump(mode="json"),
    }
    return {"result": summary, "profile_id": result.profile_id}


def _device(name: str) -> str:
    """The accelerator, or the CPU, where the settings leave the choice."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], run))
