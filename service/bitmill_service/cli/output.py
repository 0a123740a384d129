"""How commands print: tables and bars for people, JSON with `--json`, exit codes for programs.

Exit codes: 0 ok, 1 the service did not answer or failed, 2 usage or refused input, 3 job failed,
4 cancelled, 5 timeout, 6 credentials refused.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bitmill.errors import BitmillError, Cancelled, InputError, advice
from bitmill_service.client.client import Client
from bitmill_service.client.errors import (
    JobCancelled,
    JobFailed,
    ServiceError,
    Unauthorized,
    Unreachable,
    WaitTimeout,
)
from bitmill_service.units import format_size as format_size

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url", metavar="URL", help="The service; default BITMILL_URL or http://127.0.0.1:8737."
    ),
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Job id.")]


class RunFailed(BitmillError):
    """A run on local folders failed, for the reason given."""

    def __init__(self, reason: BitmillError) -> None:
        super().__init__(reason.message, code=reason.code, param=reason.param, hint=reason.hint)


_PLAIN_WIDTH = 200


def console() -> Console:
    """Where tables and bars go: standard output; wide and plain where it is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


def open_client(url: str | None) -> Client:
    """A client that gives up on a silent service within seconds, but not while it follows a job."""
    quiet = "--json" in sys.argv
    return Client(url, tries=4, on_wait=lambda text: None if quiet else typer.echo(text, err=True))


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2, default=str))


@contextmanager
def maybe_folder(target: str) -> Iterator[None]:
    """A job is asked for that may have been meant as a folder: who finds no such job is told."""
    try:
        yield
    except BitmillError as error:
        if isinstance(error, Unreachable) or error.code == "job_not_found":
            error.add(f"and there is no folder {target} here")
        raise


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int | None = None
) -> None:
    """A table; columns from `numbers_from` on are aligned right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        right = numbers_from is not None and index >= numbers_from
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def print_more(*command: str, after: str | None, **options: str | int | None) -> None:
    """The command for the page behind `after`, with the options that this one was given."""
    if after is None:
        return
    given = {**options, "after": after}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    typer.echo(f"more: bitmill {shlex.join([*command, *words])}")


@contextmanager
def goes_on(what: str, name: str, url: str | None, *, follow: str, cancel: str) -> Iterator[None]:
    """Whoever is interrupted while a job is followed is told that it goes on, by one line on
    standard error.

    follow, cancel: the commands that take its name.
    """
    try:
        yield
    except KeyboardInterrupt:
        at = [] if url is None else [f"--url={url}"]
        more, end = (
            shlex.join(["bitmill", *words.split(), name, *at]) for words in (follow, cancel)
        )
        told = f"{what} {name} goes on: `{more}` follows it, `{end}` ends it"
        if "--json" in sys.argv:
            print_error(BitmillError(told, code="interrupted"), as_json=True)
        else:
            typer.echo(told, err=True)
        raise


def format_time(time: datetime | None) -> str:
    """Local time to the second, or a dash."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S") if time else "-"


def exit_code(error: BitmillError) -> int:
    """The exit code that stands for this error."""
    if isinstance(error, Unauthorized):
        return 6
    if isinstance(error, JobFailed | RunFailed):
        return 3
    if isinstance(error, JobCancelled | Cancelled):
        return 4
    if isinstance(error, WaitTimeout):
        return 5
    refused = isinstance(error, ServiceError) and 400 <= (error.status or 0) < 500
    return 2 if refused or isinstance(error, InputError) else 1


def print_error(error: BitmillError, *, as_json: bool) -> None:
    """One line on standard error: what went wrong, then what to do."""
    if as_json:
        typer.echo(json.dumps({"error": error.to_dict()}), err=True)
        return
    more = advice(error.hint)
    text = error.message if more is None else f"{error.message.rstrip('.')}. {more}"
    typer.echo(f"error: {text}", err=True)
