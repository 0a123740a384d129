"""The `bitmill` command.

Torch-free: commands that need torch replace this process by `python -m bitmill ...`. Every command
takes `--json`; exit codes are those of `output.py`.
"""

from __future__ import annotations

import sys

import typer

from bitmill.errors import BitmillError
from bitmill_service.cli import jobs as cli_jobs
from bitmill_service.cli import local as cli_local
from bitmill_service.cli import map as cli_map
from bitmill_service.cli import service as cli_service
from bitmill_service.cli.output import exit_code, print_error

app = typer.Typer(
    name="bitmill",
    help="Turn language models into mixed-precision checkpoints of exactly the size asked for.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.command()(cli_service.demo)
app.command()(cli_service.serve)
app.command()(cli_service.worker)
for passed_on in (cli_local.quantize, cli_local.evaluate, cli_local.generate, cli_local.bench):
    app.command(context_settings=cli_local.PASS_ON)(passed_on)
app.command()(cli_local.report)
app.command()(cli_jobs.submit)
app.command()(cli_jobs.status)
app.command("list")(cli_jobs.list_jobs)
app.command()(cli_jobs.wait)
app.command()(cli_jobs.logs)
app.command()(cli_jobs.cancel)
app.command()(cli_jobs.retry)
app.command()(cli_jobs.delete)
app.command()(cli_jobs.download)
app.add_typer(cli_map.app, name="map")
app.command()(cli_service.doctor)
app.add_typer(cli_service.db, name="db")


def main() -> None:
    """Run the command line; errors become a message and an exit code, never a stack trace."""
    try:
        app()
    except BitmillError as error:
        print_error(error, as_json="--json" in sys.argv)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
