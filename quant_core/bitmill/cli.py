"""`python -m bitmill COMMAND REQUEST.json`: what needs torch, in a process of its own.

The `bitmill` command and the stage `verify` start it. There are no options: a request is one of
`pipeline/requests.py` as JSON; `verify` takes the order that its stage writes. Standard output is
JSON lines (`runtime/child.py`): progress, pieces of text, then the result or an error; what
libraries print goes to standard error. Torch is loaded when a command runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from bitmill.config.quantization import parse_part
from bitmill.errors import STOPS, BitmillError
from bitmill.evaluation.tasks import check_harness
from bitmill.formats.format import parse_format
from bitmill.io.atomic import read_json
from bitmill.pipeline.progress import Progress
from bitmill.pipeline.requests import (
    BenchRequest,
    EvaluateRequest,
    ExportRequest,
    GenerateRequest,
    QuantizeRequest,
)
from bitmill.runtime.child import Tell, as_child
from bitmill.runtime.launch import as_rank, check_devices, is_rank, run_ranks
from bitmill.runtime.process import settle_own_process

_USAGE = "usage: python -m bitmill quantize|evaluate|export|generate|bench|verify REQUEST.json"


def main(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    if len(argv) != 2 or argv[0] not in _COMMANDS:
        print(_USAGE, file=sys.stderr)
        return 2
    # Of downloads and of transformers' loading, which reads this when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with as_child() as tell:
        try:
            tell(result=_COMMANDS[argv[0]](Path(argv[1]), tell))
        except (BitmillError, *STOPS):
            raise
        except BaseException as error:
            from bitmill.runtime.memory import raise_refusal

            raise_refusal(error)
            raise
    return 0


def _quantize(file: Path, tell: Tell) -> dict[str, Any]:
    request = parse_part(QuantizeRequest, read_json(file))
    check_harness(request.config.evaluation.tasks)
    settle_own_process()
    devices = request.config.devices
    if devices > 1 and not is_rank():
        check_devices(devices, request.device)
        with tell.handed_on():
            run_ranks(devices, ["-P", "-m", "bitmill", "quantize", str(file)])
        return {}
    with as_rank(request.device) as (group, device):
        from bitmill.pipeline.job import run_job

        def on_progress(event: Progress) -> None:
            tell(progress=event.model_dump(mode="json", exclude_none=True))

        run_job(
            request.config,
            request.model,
            request.work,
            request.out,
            gguf=request.file,
            profile_folder=request.profiles,
            task_folder=request.task_folder,
            stage_folder=request.stages,
            device=device,
            group=group,
            on_progress=on_progress,
        )
    return {}


def _evaluate(file: Path, tell: Tell) -> dict[str, Any]:
    asked = parse_part(EvaluateRequest, read_json(file))
    check_harness(asked.tasks)
    from bitmill.evaluation.compare import evaluate_folder

    def on_unit(done: int, total: int, unit: str, message: str) -> None:
        told = {"done": done, "total": total, "unit": unit, "message": message}
        tell(progress={"kind": "progress", "stage": "evaluate"} | told)

    rows = evaluate_folder(
        asked.folder,
        asked.source,
        gguf=asked.file,
        texts=asked.texts,
        sequences=asked.sequences,
        length=asked.length,
        framing=asked.framing,
        device=asked.device,
        tasks=asked.tasks,
        task_folder=asked.task_folder,
        baselines=asked.baselines,
        on_unit=on_unit,
    )
    return {"rows": [row.model_dump(mode="json") for row in rows]}


def _export(file: Path, tell: Tell) -> dict[str, Any]:
    asked = parse_part(ExportRequest, read_json(file))
    from bitmill.pipeline.export import Export

    export = Export.of(asked.folder, parse_format(asked.format, asked.settings))
    if asked.dry_run or asked.out is None:
        return export.report().model_dump(mode="json")
    written = export.write(
        asked.out, lambda done, total: tell(text=f"{done} of {total} linears written")
    )
    return written.model_dump(mode="json")


def _generate(file: Path, tell: Tell) -> dict[str, Any]:
    asked = parse_part(GenerateRequest, read_json(file))
    from bitmill.inference.generate import stream

    for piece in stream(**dict(asked)):
        tell(text=piece)
    return {}


def _bench(file: Path, _: Tell) -> dict[str, Any]:
    asked = parse_part(BenchRequest, read_json(file))
    from bitmill.inference.bench import bench

    return bench(**dict(asked))


def _verify(file: Path, _: Tell) -> dict[str, Any]:
    from bitmill.pipeline.stages.verify import verify_order

    verify_order(read_json(file))
    return {}


_COMMANDS = {
    "quantize": _quantize,
    "evaluate": _evaluate,
    "export": _export,
    "generate": _generate,
    "bench": _bench,
    "verify": _verify,
}
