"""Commands that work on local folders. Those that need torch become `python -m bitmill ...`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bitmill.errors import InputError
from bitmill.results import QualityReport
from bitmill_service.cli.output import JsonFlag, UrlOption, open_client, print_json
from bitmill_service.cli.report_table import parse_rows, print_learning, print_report

PASS_ON = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
"""Settings of a command that hands everything, `--help` included, to another program."""


def library_command(command: str, arguments: list[str]) -> list[str]:
    """The program that runs a command of the library in a process of its own."""
    return [sys.executable, "-P", "-m", "bitmill", command, *arguments]


def _become(command: str, arguments: list[str]) -> None:
    """Replace this process, so that signals and the exit code need no relay."""
    line = library_command(command, arguments)
    sys.stdout.flush()
    os.execv(line[0], line)


def quantize(context: typer.Context) -> None:
    """Quantize a local model without a server."""
    _become("quantize", context.args)


def evaluate(context: typer.Context) -> None:
    """Measure perplexity and KL of a packed folder against its source."""
    _become("evaluate", context.args)


def generate(context: typer.Context) -> None:
    """Continue a prompt with a packed model."""
    _become("generate", context.args)


def bench(context: typer.Context) -> None:
    """Measure prefill and decode speed and memory of a packed folder."""
    _become("bench", context.args)


def report(
    target: Annotated[
        str, typer.Argument(metavar="DIR|JOB", help="A packed folder, or a job of the service.")
    ],
    *,
    html: Annotated[
        Path | None, typer.Option(help="Write one self-contained HTML page here (folders only).")
    ] = None,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Print the quality report of a packed folder or of a finished job."""
    if html is not None and not Path(target).is_dir():
        raise InputError(f"--html needs a packed folder: download {target} first", param="--html")
    if html is not None:
        from bitmill.reporting.html import write_report

        write_report(Path(target), html)
    if Path(target).is_dir():
        found = QualityReport.load(Path(target) / "quality.json").model_dump(mode="json")
    else:
        with open_client(url) as client:
            found = client.report(target)
    if json:
        print_json(found)
        return
    print_report(parse_rows(found["rows"]))
    print_learning(found)
    for warning in found.get("warnings", ()):
        typer.echo(f"warning: {warning}")
