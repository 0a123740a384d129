"""The `bitmill` command: one Typer application.

Torch-free: commands that need torch run `python -m bitmill` in a process of its own (`local.py`).
Every command takes `--json`; exit codes are those of `output.py`.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

import bitmill
from bitmill.errors import BitmillError, InputError
from bitmill_service.cli import jobs, keys, local, map, operate, service, sweep, top
from bitmill_service.cli.options import GroupedCommand
from bitmill_service.cli.output import exit_code, print_error

app = typer.Typer(
    name="bitmill",
    help="Turn language models into mixed-precision checkpoints of exactly the size asked for.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bitmill {bitmill.__version__}")
        raise typer.Exit


@app.callback(help=app.info.help)
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """What stands before a command."""


for command in (
    *(service.demo, service.serve, service.worker),
    *(local.quantize, local.evaluate, local.generate, local.bench, local.report, local.export),
    *(local.push, sweep.sweep, top.top),
    *(jobs.submit, jobs.status, jobs.list_jobs, jobs.wait, jobs.logs),
    *(jobs.cancel, jobs.retry, jobs.delete, jobs.download, service.doctor),
    *(jobs.pin, jobs.unpin, keys.login, keys.logout),
    *(operate.prune, operate.backup, operate.restore),
):
    app.command(command.__name__.removesuffix("_jobs"), cls=GroupedCommand)(command)
app.add_typer(map.app, name="map")
app.add_typer(sweep.sweeps, name="sweeps")
app.add_typer(keys.keys, name="keys")
app.add_typer(operate.workers, name="workers")
app.add_typer(service.db, name="db")


def main() -> None:
    """Run the command line; errors become one line and an exit code, never a stack trace."""
    as_json = "--json" in sys.argv
    _open_closed_streams()
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="bitmill", standalone_mode=False))
    except BitmillError as error:
        failure = error
    except TyperException as error:
        context: typer.Context | None = getattr(error, "ctx", None)
        hint = None if context is None else f"See `{context.command_path} --help`."
        failure = InputError(error.format_message(), code="usage", hint=hint)
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        failure = BitmillError(f"{place}{error.strerror or error}", code="file_error")
    except KeyboardInterrupt:
        sys.exit(130)
    print_error(failure, as_json=as_json)
    sys.exit(exit_code(failure))


def _open_closed_streams() -> None:
    """Give a program that was started without some of its three streams empty ones, which no file
    that it opens can take the place of."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


if __name__ == "__main__":
    main()
