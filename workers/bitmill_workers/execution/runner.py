"""The runner: one job's pipeline in a process of its own, without network, secrets or database.

Started by the supervisor as `python -m bitmill_workers.execution.runner <request> <message fd>`.
For a job on several devices it is the launcher of their ranks (`rank.py`), which die with it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitmill.runtime.launch import check_devices, run_ranks
from bitmill.runtime.process import settle_own_process
from bitmill_workers.execution.child import Emit, Emitter, serve
from bitmill_workers.execution.stage_turns import RunnerTurns

if TYPE_CHECKING:
    import torch

    from bitmill.runtime.ranks import Ranks


def run(request: dict[str, Any], emit: Emitter) -> dict[str, Any]:
    """Run the pipeline, or an export, in local folders, relay its progress and return what it
    found."""
    settle_own_process()
    if "export" in request:
        return run_export(request, emit)
    request["device"] = _device(request["device"])
    devices = request["config"]["devices"]
    if devices == 1:
        return run_pipeline(request, emit, request["device"])
    check_devices(devices, request["device"])
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        order, answer = Path(folder, "request.json"), Path(folder, "result.json")
        order.write_text(json.dumps(request))
        os.dup2(emit.fd, 0)  # the only descriptors that the launcher hands on are 0, 1 and 2
        arguments = ["-m", "bitmill_workers.execution.rank", str(order), str(answer)]
        run_ranks(devices, arguments)
        result: dict[str, Any] = json.loads(answer.read_bytes())
        return result


def run_pipeline(
    request: dict[str, Any], emit: Emit, device: str | torch.device, group: Ranks | None = None
) -> dict[str, Any]:
    """The pipeline itself, in this process, as one rank of `group` or alone."""
    from bitmill.config.quantization import QuantizationConfig
    from bitmill.pipeline.job import run_job
    from bitmill.pipeline.progress import Progress
    from bitmill.runtime.ranks import SINGLE

    def on_progress(progress: Progress) -> None:
        emit({"type": "progress", **progress.model_dump(mode="json", exclude_none=True)})

    turns = RunnerTurns(emit, Path(request["turns"])) if request["stage_folder"] else None
    result = run_job(
        QuantizationConfig.model_validate(request["config"]),
        Path(request["model_folder"]),
        Path(request["job_dir"]),
        Path(request["output_dir"]),
        gguf=request["gguf"],
        profile_folder=Path(request["profile_folder"]),
        stage_folder=Path(request["stage_folder"]) if request["stage_folder"] else None,
        turns=turns,
        device=device,
        group=group or SINGLE,
        model_name=request["model_name"],
        on_progress=on_progress,
        should_stop=lambda: False,
    )
    summary = {
        "bytes": result.manifest.total_bytes,
        "quality": result.quality.model_dump(mode="json"),
    }
    made_for = result.map.made_for
    told = None if made_for is None else made_for.model_dump(mode="json")
    return {"result": summary, "profile_id": result.profile_id, "made_for": told}


def run_export(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Write the packed folder in another format, verified."""
    from bitmill.formats.export_plan import ExportTarget
    from bitmill.pipeline.export import Export

    def on_linear(done: int, total: int) -> None:
        progress = {"kind": "progress", "stage": "pack", "done": done, "total": total}
        emit({"type": "progress", "unit": "linear", **progress})

    emit({"type": "progress", "kind": "stage", "stage": "pack", "state": "started"})
    export = Export.of(Path(request["packed"]), ExportTarget(**request["export"]).chosen)
    report = export.write(Path(request["output_dir"]), on_linear)
    emit({"type": "progress", "kind": "stage", "stage": "pack", "state": "finished"})
    return {"result": report.model_dump(mode="json")}


def _device(name: str) -> str:
    """The accelerator, or the CPU, where the settings leave the choice."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1:], run))
