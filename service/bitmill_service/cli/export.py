"""`bitmill export`: a packed folder in the format of another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bitmill.errors import InputError
from bitmill.formats.format import FORMATS
from bitmill.pipeline.requests import ExportRequest
from bitmill_service.cli.local import run_library
from bitmill_service.cli.options import json_object
from bitmill_service.cli.output import JsonFlag, print_json


def export(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="A packed folder.", exists=True, file_okay=False),
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
    json: JsonFlag = False,
) -> None:
    """Write a packed folder in the format of another runtime, verified before it appears.

    Example: bitmill export packed --format dequantized --out plain
    """
    if list:
        _print_formats(json)
        return
    if folder is None or format is None or (out is None and not dry_run):
        raise InputError("give DIR, --format and --out; `bitmill export --list` names the formats")
    asked = json_object(settings, "--settings") if settings else {}
    request = ExportRequest(folder=folder, format=format, settings=asked, out=out, dry_run=dry_run)
    console = Console(stderr=True, highlight=False)
    with console.status(f"exporting to {format}") as status:
        found = run_library("export", request, lambda told: status.update(told["text"]))
    if json:
        print_json(found)
        return
    what = "would take" if dry_run else "takes"
    typer.echo(
        f"{format}: {found['linears']} linears, {found['tensors']} tensors, {what} "
        f"{found['file_bytes']:,} bytes (packed: {found['packed_bytes']:,})"
    )


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
