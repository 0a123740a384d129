"""Commands that work on local folders. Those that need torch run as `python -m bitmill`."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from bitmill.config.quantization import Framing, parse_part
from bitmill.errors import (
    BitmillError,
    Cancelled,
    InputError,
    ModelError,
)
from bitmill.formats.export_plan import ExportTarget
from bitmill.formats.format import FORMATS
from bitmill.io.targets import check_apart
from bitmill.library.push import push as push_folder
from bitmill.pipeline.requests import (
    BenchRequest,
    EvaluateRequest,
    ExportRequest,
    GenerateRequest,
    QuantizeRequest,
    Request,
)
from bitmill.pipeline.work_folder import work_folder
from bitmill.reporting.learning import learning_summary
from bitmill.results import QUALITY_NAME, QualityReport
from bitmill.runtime.child import run_child
from bitmill_service.cli.options import COMMON, LOCAL_RESULTS, SpecFile, json_object, takes
from bitmill_service.cli.output import (
    JsonFlag,
    RunFailed,
    UrlOption,
    maybe_folder,
    open_client,
    print_json,
)
from bitmill_service.cli.progress import JobWatch
from bitmill_service.cli.report_table import parse_rows, print_quality, print_report
from bitmill_service.cli.spec import Given, build_spec, comma_separated
from bitmill_service.client.download import check_free
from bitmill_workers.job_spec import PushTarget

FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A packed folder.", exists=True, file_okay=False)
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
TaskFolderOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Task files of one's own for --tasks; they may run code."),
]


def run_library(
    command: str,
    request: Request,
    on_message: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Run a command of `python -m bitmill` and return its result.

    However this process ends, the child does too. Raises what the child raises; what is neither
    refused input nor a wish to stop as `RunFailed`.
    """
    with tempfile.TemporaryDirectory(prefix="bitmill-") as folder, ended_by_signals():
        file = Path(folder, "request.json")
        file.write_text(request.model_dump_json())
        try:
            return run_child(
                f"the process of `bitmill {command}`",
                ["-m", "bitmill", command, str(file)],
                on_message,
            )
        except (InputError, Cancelled):
            raise
        except BitmillError as error:
            raise RunFailed(error) from error


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit as Ctrl-C raises KeyboardInterrupt, so that what was
    begun is cleaned up.
    """
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@takes(*COMMON, LOCAL_RESULTS)
def quantize(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="Folder of the source model.")
    ] = None,
    *,
    given: Given,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to make.")],
    spec: SpecFile = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of finished stages, kept for resuming."),
    ] = None,
    profiles: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Sensitivity profiles to reuse and keep.")
    ] = None,
    task_folder: TaskFolderOption = None,
    device: DeviceOption = "cpu",
    json: JsonFlag = False,
) -> None:
    """Quantize a local model without a server; progress goes to standard error.

    Example: bitmill quantize models/SmolLM2-135M --bits 3 --out packed
    """
    source = None if model is None else {"source": "path", "path": str(model)}
    asked = build_spec(source, spec, given)
    if asked.model.source != "path":
        raise InputError("quantize reads local folders; submit a job for other models")
    folder, config = Path(asked.model.path), asked.config()
    if not folder.is_dir():
        raise ModelError(_no_folder(folder), code="model_not_found", param="model")
    files = folder / (asked.model.file or "")
    check_apart({"the source": files, "the output": out, "the work folder": work})
    with (
        work_folder(out, work) as stages,
        JobWatch(Console(stderr=True, highlight=False)) as watch,
    ):
        request = parse_part(
            QuantizeRequest,
            {
                "model": folder,
                "file": asked.model.file,
                "config": config,
                "out": out,
                "work": stages,
                "profiles": profiles,
                "task_folder": task_folder,
                "device": device,
            },
        )
        run_library("quantize", request, lambda m: watch.show(m["progress"]["kind"], m["progress"]))
    quality = QualityReport.load(out / QUALITY_NAME)
    if json:
        shown = quality.model_dump(mode="json", include={"rows"})
        shown |= {
            "folder": str(out),
            "learning": learning_summary(quality.blocks, quality.tuning, resumed=quality.resumed),
            "warnings": [f"warning: {warning}" for warning in quality.warnings],
        }
        print_json(shown)
    else:
        print_quality(quality.model_dump(mode="json"))


def _no_folder(place: Path) -> str:
    if place.suffix == ".gguf" and place.is_file():
        return f"{place} is a file: give its folder, {place.parent}, and --file {place.name}"
    if place.exists():
        return f"{place} is no folder: give the folder of the model"
    return (
        f"there is no folder {place}: quantize reads local models; fetch one of the Hub with "
        "`hf download`, or have a service do all of it with `bitmill submit`"
    )


def evaluate(
    folder: FolderArgument,
    *,
    source: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder of the source model.", exists=True, file_okay=False
        ),
    ],
    file: Annotated[
        str | None, typer.Option(metavar="NAME", help="GGUF file in the source's folder.")
    ] = None,
    texts: Annotated[
        str, typer.Option(metavar="TEXT,...", help="Bundled texts to measure.")
    ] = "wiki_evaluation,handbook_evaluation",
    sequences: Annotated[int | None, typer.Option(help="At most so many windows.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    framing: Annotated[Framing, typer.Option(help="How windows begin.")] = "tokenizer",
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASK,...", help="Tasks of lm-evaluation-harness to measure."),
    ] = None,
    task_folder: TaskFolderOption = None,
    baselines: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Measure it with inputs of linears or the cache rounded too: activations-8, "
            "cache-4, as --baselines of quantize.",
        ),
    ] = None,
    device: DeviceOption = "cpu",
    json: JsonFlag = False,
) -> None:
    """Measure perplexity and KL of a packed folder against its source.

    Example: bitmill evaluate packed --source models/SmolLM2-135M --sequences 20
    """
    request = parse_part(
        EvaluateRequest,
        {
            "folder": folder,
            "source": source,
            "file": file,
            "texts": comma_separated(texts),
            "sequences": sequences,
            "length": length,
            "framing": framing,
            "tasks": comma_separated(tasks) if tasks else (),
            "task_folder": task_folder,
            "baselines": comma_separated(baselines) if baselines else (),
            "device": device,
        },
    )
    with JobWatch(Console(stderr=True, highlight=False)) as watch:
        found = run_library(
            "evaluate", request, lambda told: watch.show("progress", told["progress"])
        )
    if json:
        print_json(found)
    else:
        print_report(parse_rows(found["rows"]))


def generate(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder of a model.", exists=True, file_okay=False),
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    *,
    file: Annotated[
        str | None, typer.Option(metavar="NAME", help="GGUF file in the folder.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the chat template.")
    ] = False,
    device: DeviceOption = "cpu",
    json: JsonFlag = False,
) -> None:
    """Continue a prompt with a packed model, or with one in transformers' own form.

    Example: bitmill generate packed "A water mill is"
    """
    request = parse_part(
        GenerateRequest,
        {
            "folder": folder,
            "prompt": prompt,
            "gguf": file,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "chat": chat,
            "device": device,
        },
    )
    pieces: list[str] = []

    def on_text(message: dict[str, Any]) -> None:
        pieces.append(message["text"])
        if not json:
            typer.echo(message["text"], nl=False)

    run_library("generate", request, on_text)
    if json:
        print_json({"prompt": prompt, "text": "".join(pieces)})
    else:
        typer.echo()


def bench(
    folder: FolderArgument,
    *,
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        typer.Option(help="Type of everything that is not quantized; auto: the folder's."),
    ] = "auto",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    device: DeviceOption = "cpu",
    json: JsonFlag = False,
) -> None:
    """Measure prefill and decode speed and memory of a packed folder.

    Example: bitmill bench packed --device cuda
    """
    request = parse_part(
        BenchRequest,
        {
            "folder": folder,
            "dtype": dtype,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "device": device,
        },
    )
    found = run_library("bench", request)
    if json:
        print_json(found)
        return
    for name in ("packed", "dense"):
        speed = found[name]
        typer.echo(
            f"{name:7} prefill {speed['prefill_tokens_per_second']:9.1f} tokens/s, "
            f"decode {speed['decode_tokens_per_second']:7.1f} tokens/s, "
            f"peak {speed['peak_bytes'] / 1e9:.2f} GB"
        )


def export(
    target: Annotated[
        str | None,
        typer.Argument(metavar="DIR|JOB", help="A packed folder, or a job of the service."),
    ] = None,
    *,
    format: Annotated[str | None, typer.Option(metavar="NAME", help="Format to write.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder to make.")
    ] = None,
    settings: Annotated[
        str | None, typer.Option(metavar="JSON", help="Settings of the format, as a JSON object.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, or why it is refused.")
    ] = False,
    list: Annotated[bool, typer.Option("--list", help="Name all formats and end.")] = False,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Write a packed folder in the format of another runtime, verified before it appears.

    Of a job the service writes it, by a job of its own; --out waits for it and downloads it.

    Example: bitmill export packed --format dequantized --out plain
    """
    if list:
        _print_formats(json)
        return
    here = target is not None and Path(target).is_dir()
    if target is None or format is None or (here and out is None and not dry_run):
        raise InputError(
            "give DIR or JOB, --format and for a folder --out; `bitmill export --list` names the "
            "formats"
        )
    asked = json_object(settings, "--settings", '{"dtype": "fp8"}') if settings else {}
    if here:
        request = ExportRequest(
            folder=Path(target), format=format, settings=asked, out=out, dry_run=dry_run
        )
        with Console(stderr=True, highlight=False).status(f"exporting to {format}") as status:
            found = run_library("export", request, lambda told: status.update(told["text"]))
    else:
        wanted = parse_part(ExportTarget, {"format": format, "settings": asked})
        found = _export_job(target, wanted, out, url, dry_run=dry_run, quiet=json)
    if json:
        print_json(found)
        return
    what = "would take" if dry_run else "takes"
    typer.echo(
        f"{format}: {found['linears']} linears, {found['tensors']} tensors, {what} "
        f"{found['file_bytes']:,} bytes (packed: {found['packed_bytes']:,})"
    )


def _hub_token() -> str | None:
    """The caller's token of the Hub; the client alone, without its library, knows HF_TOKEN."""
    if find_spec("huggingface_hub") is None:
        return os.environ.get("HF_TOKEN") or None
    from huggingface_hub import get_token

    return get_token()


def _export_job(
    job_id: str,
    target: ExportTarget,
    out: Path | None,
    url: str | None,
    *,
    dry_run: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Have the service write a job's result; what it takes, and which job writes it."""
    if out is not None and not dry_run:
        check_free(out)
    with maybe_folder(job_id), open_client(url) as client:
        told = client.plan_export(job_id, target).model_dump(mode="json")
        if dry_run:
            return told
        job = client.export(job_id, target)
        if not quiet:
            typer.echo(f"job {job.id}")
        if out is not None:
            client.wait(job.id)
            client.download(job.id, out)
    return told | {"job_id": job.id}


def push(
    target: Annotated[
        str,
        typer.Argument(metavar="DIR|JOB", help="A packed folder or export, or a finished job."),
    ],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hub.")],
    *,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    base_model: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Repository of the source model.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="Licence, by its identifier on the Hub.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a job's push to end.")] = False,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Send files to the Hub, with a model card made from the quality report.

    The token is HF_TOKEN or that of `hf auth login`. Of a job the service sends them, which keeps
    the token encrypted until then. A broken push is gone on with by the next one.

    Example: bitmill push packed me/model-3bit --base-model org/model --license apache-2.0
    """
    token = _hub_token()
    if token is None:
        raise InputError("there is no token of the Hub: set HF_TOKEN, or use `hf auth login`")
    asked = {"repo_id": repo, "private": not public, "base_model": base_model, "license": license}
    wanted = parse_part(PushTarget, asked)
    if Path(target).is_dir():
        found = push_folder(Path(target), token=token, **dict(wanted)).model_dump(mode="json")
        told = f"{found['files']} files, {found['bytes']:,} bytes: {found['url']}"
    else:
        with maybe_folder(target), open_client(url) as client:
            job = client.push(target, wanted, token)
            job = client.wait(job.id) if wait else job
        found, told = job.model_dump(mode="json"), f"job {job.id} {job.state}"
    if json:
        print_json(found)
    else:
        typer.echo(told)


def _print_formats(as_json: bool) -> None:
    formats: dict[str, Any] = {}
    for name in FORMATS.names():
        kind = FORMATS[name]
        formats[name] = {
            "what": (kind.__doc__ or "").partition("\n")[0],
            "job": kind.keeps_codes,
            "settings": {key: field.default for key, field in kind.model_fields.items()},
        }
    if as_json:
        print_json(formats)
        return
    for name, known in formats.items():
        use = "results of jobs" if known["job"] else "exports"
        typer.echo(f"{name:20} {use:16} {known['what']}")


def report(
    target: Annotated[
        str, typer.Argument(metavar="DIR|JOB", help="A packed folder, or a job of the service.")
    ],
    *,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write one self-contained HTML page here, over an earlier one alone; of folders."
        ),
    ] = None,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Print the quality report of a packed folder or of a finished job.

    Example: bitmill report packed --html report.html
    """
    if html is not None and not Path(target).is_dir():
        raise InputError(f"--html needs a packed folder: download {target} first", param="--html")
    if html is not None:
        from bitmill.reporting.html import write_report

        write_report(Path(target), html)
    if Path(target).is_dir():
        found = QualityReport.load(Path(target) / QUALITY_NAME).model_dump(mode="json")
    else:
        with maybe_folder(target), open_client(url) as client:
            found = client.report(target)
    if json:
        print_json(found)
    else:
        print_quality(found)
