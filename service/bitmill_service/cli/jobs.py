"""Commands that talk to a service about jobs."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from bitmill.config.quantization import Budget
from bitmill.errors import InputError, advice
from bitmill.pipeline.estimate import Estimate
from bitmill_service.cli.options import COMMON, JOB, SERVICE_RESULTS, SpecFile, takes
from bitmill_service.cli.output import (
    JobArgument,
    JsonFlag,
    UrlOption,
    console,
    format_size,
    format_time,
    goes_on,
    open_client,
    print_json,
    print_more,
    print_table,
)
from bitmill_service.cli.progress import JobWatch
from bitmill_service.cli.report_table import parse_rows, print_report
from bitmill_service.cli.spec import Given, build_spec, local_folder, model_reference
from bitmill_service.client.client import Client
from bitmill_service.client.download import check_free
from bitmill_service.schemas import EmbeddingsView, JobView, PlanView


@takes(*COMMON, SERVICE_RESULTS, JOB)
def submit(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="./FOLDER or ./FILE.gguf (uploaded), path:ROOT/FOLDER, upload:ID, or a Hub "
            "repository ORG/NAME[@REVISION], hub:ORG/NAME where a folder here is called so.",
        ),
    ] = None,
    *,
    given: Given,
    spec: SpecFile = None,
    key: Annotated[
        str | None, typer.Option(help="Idempotency key: repeat the call without a second job.")
    ] = None,
    validate_only: Annotated[
        bool, typer.Option("--validate-only", help="Show the plan and create nothing.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job has finished.")] = False,
    download: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Wait, then download the files to DIR.")
    ] = None,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Submit a job; settings that are not given are those of --spec, or defaults.

    Example: bitmill submit HuggingFaceTB/SmolLM2-135M --bits 3 --wait
    """
    if download is not None:
        check_free(download)
    with open_client(url) as client:
        built = build_spec(_model(client, model, quiet=json), spec, given)
        if validate_only:
            _show_plan(client.plan(built), as_json=json)
            return
        job = client.submit(built, idempotency_key=key)
        if not json:
            typer.echo(f"job {job.id}")
        if wait or download is not None:
            job = _watch(client, job.id, None, url, quiet=json)
        shown = job.model_dump(mode="json")
        if download is not None:
            shown |= {"download": _download(client, job.id, download, (), 4, quiet=json)}
        if json:
            print_json(shown)


def _model(client: Client, text: str | None, *, quiet: bool) -> dict[str, Any] | None:
    """The reference of a model; one on this machine is uploaded first."""
    if text is None:
        return None
    place = local_folder(text)
    if place is None:
        if Path(text).exists():
            raise InputError(
                f"{text} is here, and may be a repository of the Hub too: give ./{text} to upload "
                f"it, path:ROOT/FOLDER where the service has it, or hub:{text}",
                code="usage",
                param="MODEL",
            )
        return model_reference(text)
    with _transfer_bar(quiet=quiet) as bar:
        task = bar.add_task(f"uploading {place.name or place}", total=None)
        upload = client.upload(
            place,
            on_start=lambda size: bar.update(task, total=size),
            on_bytes=lambda count: bar.update(task, advance=count),
        )
    if not quiet:
        typer.echo(f"upload {upload.id}: {format_size(upload.size)} in {len(upload.files)} files")
    named = {"file": place.name} if place.suffix == ".gguf" else {}
    return {"source": "upload", "upload_id": upload.id} | named


def status(job: JobArgument, *, url: UrlOption = None, json: JsonFlag = False) -> None:
    """Show one job.

    Example: bitmill status JOB
    """
    with open_client(url) as client:
        view = client.get(job)
    if json:
        print_json(view.model_dump(mode="json"))
    else:
        _show_job(view)


def list_jobs(
    *,
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    label: Annotated[str | None, typer.Option(help="Only jobs with this label.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Jobs on a page.")] = 50,
    after: Annotated[
        str | None, typer.Option(help="Cursor that the page before ended with.")
    ] = None,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """List jobs, newest first.

    Example: bitmill list --state running --limit 10
    """
    with open_client(url) as client:
        page = client.list_jobs(state=state, model=model, label=label, limit=limit, after=after)
    if json:
        print_json(page.model_dump(mode="json"))
        return
    rows = [
        (j.id, j.state, j.stage or "-", model_text(j), budget_text(j), format_time(j.created_at))
        for j in page.jobs
    ]
    print_table(("job", "state", "stage", "model", "budget", "created"), rows)
    asked = {"state": state, "model": model, "label": label, "limit": limit, "url": url}
    print_more("list", after=page.next, **asked)


def wait(
    job: JobArgument,
    *,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Give up waiting after this.")
    ] = None,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Wait until a job has finished; exit code 3 if it failed, 4 if cancelled, 5 on timeout.

    Example: bitmill wait JOB --timeout 3600
    """
    with open_client(url) as client:
        view = _watch(client, job, timeout, url, quiet=json)
    if json:
        print_json(view.model_dump(mode="json"))


def logs(
    job: JobArgument,
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has finished.")
    ] = False,
    offset: Annotated[int, typer.Option(min=0, help="First byte.")] = 0,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Print a job's log.

    Example: bitmill logs JOB --follow
    """
    with open_client(url) as client:
        if json:
            print_json({"text": "".join(client.logs(job, offset=offset, follow=follow))})
            return
        for text in client.logs(job, offset=offset, follow=follow):
            sys.stdout.write(text)
            sys.stdout.flush()


def cancel(job: JobArgument, *, url: UrlOption = None, json: JsonFlag = False) -> None:
    """Ask a job to stop.

    Example: bitmill cancel JOB
    """
    with open_client(url) as client:
        _say(client.cancel(job), as_json=json)


def retry(job: JobArgument, *, url: UrlOption = None, json: JsonFlag = False) -> None:
    """Submit a job's specification again, as a new job.

    Example: bitmill retry JOB
    """
    with open_client(url) as client:
        _say(client.retry(job), as_json=json)


def pin(job: JobArgument, *, url: UrlOption = None, json: JsonFlag = False) -> None:
    """Keep a job's files whatever their age.

    Example: bitmill pin JOB
    """
    with open_client(url) as client:
        _say(client.pin(job), as_json=json)


def unpin(job: JobArgument, *, url: UrlOption = None, json: JsonFlag = False) -> None:
    """Let a job's files go when their time is over.

    Example: bitmill unpin JOB
    """
    with open_client(url) as client:
        _say(client.pin(job, False), as_json=json)


def delete(job: JobArgument, *, url: UrlOption = None, json: JsonFlag = False) -> None:
    """Remove a finished job with all its files.

    Example: bitmill delete JOB
    """
    with open_client(url) as client:
        client.delete(job)
    if json:
        print_json({"deleted": job})
    else:
        typer.echo(f"job {job} deleted")


def download(
    job: JobArgument,
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.")
    ] = Path("."),
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only files that match; repeatable.")
    ] = None,
    parallel: Annotated[
        int, typer.Option("--parallel", "-j", min=1, max=16, help="Files at a time.")
    ] = 4,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Download a finished job's files; verified, and resumed where an earlier run stopped.

    Example: bitmill download JOB --out packed
    """
    with open_client(url) as client:
        done = _download(client, job, out, tuple(include or ()), parallel, quiet=json)
    if json:
        print_json(done)


def _watch(
    client: Client, job_id: str, timeout: float | None, url: str | None, *, quiet: bool
) -> JobView:
    with goes_on("job", job_id, url, follow="wait", cancel="cancel"):
        if quiet:
            return client.wait(job_id, timeout=timeout)
        with JobWatch(console()) as watch:
            return client.wait(job_id, timeout=timeout, on_event=watch.on_event)


def _download(
    client: Client, job: str, out: Path, include: tuple[str, ...], parallel: int, *, quiet: bool
) -> dict[str, Any]:
    """Download with a bar and a line, or quietly; what was done, for JSON."""
    with _transfer_bar(quiet=quiet) as bar:
        task = bar.add_task("download", total=None)
        done = client.download(
            job,
            out,
            include=include,
            parallel=parallel,
            on_bytes=lambda count: bar.advance(task, count),
        )
    if not quiet:
        typer.echo(
            f"{len(done.fetched)} files fetched ({format_size(done.bytes_fetched)}), "
            f"{len(done.skipped)} already there, all verified: {done.folder}"
        )
    return asdict(done)


def _transfer_bar(*, quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console(),
        disable=quiet or not console().is_terminal,
    )


def _say(job: JobView, *, as_json: bool) -> None:
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        typer.echo(f"job {job.id} {job.state}")


def model_text(job: JobView) -> str:
    """The model's name, without its revision."""
    return str(job.model.get("repo_id") or job.model.get("path") or job.model.get("upload_id"))


def budget_text(job: JobView) -> str:
    """What the job is to make, in words."""
    if job.kind != "quantize":
        return f"{job.kind} {job.spec.get('format') or job.spec.get('repo_id')}"
    budget = Budget.model_validate(job.spec["budget"])
    if not budget.in_bytes:
        return f"{budget.value:g} {budget.kind.replace('_', ' ')}"
    size = format_size(int(budget.value))
    if budget.kind == "size":
        return size
    return f"{size} with {budget.batch} x {budget.context} tokens"


def _show_job(job: JobView) -> None:
    rows = [
        ("job", job.id),
        ("state", job.state),
        ("stage", job.stage or "-"),
        ("model", model_text(job)),
        ("budget", budget_text(job)),
        ("attempt", str(job.attempt)),
        ("created", format_time(job.created_at)),
        ("started", format_time(job.started_at)),
        ("finished", format_time(job.finished_at)),
    ]
    if job.progress is not None:
        p = job.progress
        rows.insert(3, ("progress", f"{p.done}/{p.total} {p.unit}"))
    if job.eta is not None and not job.terminal:
        rows.append(("finishes about", format_time(job.eta)))
    if job.error is not None:
        rows.append(("error", f"{job.error.code}: {job.error.message}"))
        more = advice(job.error.hint)
        rows += [] if more is None else [("what to do", more)]
    for name, value in rows:
        typer.echo(f"{name + ':':<16}{value}")
    if job.result and job.result.get("rows"):
        print_report(parse_rows(job.result["rows"]))


def _show_plan(plan: PlanView, *, as_json: bool) -> None:
    if as_json:
        print_json(plan.model_dump(mode="json"))
        return
    typer.echo(
        f"{plan.model_type}: {plan.blocks} blocks, {plan.linears} linears, {plan.groups} groups, "
        f"{plan.weights:,} weights\n"
        f"checkpoint: {format_size(plan.smallest.size)} at {plan.smallest.width} bits to "
        f"{format_size(plan.largest.size)} at {plan.largest.width} bits\n"
        f"read by: {', '.join(plan.runtimes)}\n"
        + "".join(
            f"export {one.format}: {format_size(one.smallest)} to {format_size(one.largest)}, "
            f"read by {', '.join(one.runtimes)}\n"
            for one in plan.exports
        )
        + _embeddings(plan.embeddings)
        + f"needs on a CPU: {_needs(plan.estimate)}\n"
        f"needs on accelerators: {format_size(plan.on_accelerator.accelerator_bytes)} of each, "
        f"{_needs(plan.on_accelerator)}"
    )


def _embeddings(found: EmbeddingsView | None) -> str:
    """What packing them too would save."""
    if found is None:
        return ""
    packed = ", ".join(f"{format_size(size)} at {width}" for width, size in found.packed.items())
    return f"embeddings: {format_size(found.kept)} kept, {packed} bits (--embeddings quantize)\n"


def _needs(estimate: Estimate) -> str:
    """What a runner needs, in words; the time is no more than an order of magnitude."""
    memory, disk = format_size(estimate.host_bytes), format_size(estimate.disk_bytes)
    minutes = max(1, round(estimate.seconds / 60))
    return f"{memory} of memory, {disk} of disk, about {minutes:,} min"
