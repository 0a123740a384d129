"""Makes docs/cli.md from the commands' own help; a test compares the two.

python -m bitmill_service.cli.docs > docs/cli.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from typer.main import get_command

from bitmill_service.cli.main import app

_HEAD = """# Command line
Made by `python -m bitmill_service.cli.docs > docs/cli.md`; a test keeps it up to date.

Every command takes `--json`: one JSON document on standard output, errors as one on standard error.
Progress is shown as bars on a terminal and as plain lines otherwise, both with the pace and the
time that the stage will still take. `bitmill --install-completion` lets bash, zsh, fish or
PowerShell complete commands and options, `bitmill --version` names the version.

| exit code | means |
|---|---|
| 0 | ok |
| 1 | the service did not answer, or failed |
| 2 | usage, or refused input |
| 3 | the job failed |
| 4 | cancelled |
| 5 | timeout |
| 6 | credentials refused |

Options of a specification (budget, allocation, refinement, calibration, evaluation, run) are the
same in `quantize` and `submit`; each sets one field, and what is not given is as in `--spec` or its
default. `BITMILL_URL` names the service that the job commands talk to. `quantize`, `evaluate`,
`generate` and `bench` need torch: they run it in a process of its own, which ends with the command.
"""


def pages() -> Iterator[str]:
    """The document, heading by heading."""
    yield _HEAD
    for path, _ in commands():
        yield f"## bitmill {' '.join(path)}\n```text\n{help_of(path)}\n```\n"


def commands() -> Iterator[tuple[list[str], Any]]:
    """Every command with its path, e.g. ["map", "show"]."""
    whole: Any = get_command(app)
    for name, command in whole.commands.items():
        if hasattr(command, "commands"):
            yield from (([name, below], inner) for below, inner in command.commands.items())
        else:
            yield [name], command


def help_of(path: list[str]) -> str:
    """What `bitmill ... --help` prints."""
    with redirect_stdout(StringIO()) as out:
        app([*path, "--help"], prog_name="bitmill", standalone_mode=False)
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def main() -> None:
    """Print the document."""
    sys.stdout.write("\n".join(pages()))


if __name__ == "__main__":
    main()
