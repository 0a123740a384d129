"""Makes docs/cli.md from the commands' own help; a test compares the two.

python -m bitmill_service.cli.docs > docs/cli.md
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO

from bitmill_service.cli.local import PASS_ON, library_command
from bitmill_service.cli.main import app

_HEAD = """# Command line
Made by `python -m bitmill_service.cli.docs > docs/cli.md`; a test keeps it up to date.

Every command takes `--json`: one JSON document on standard output, errors as one on standard error.
Progress is shown as bars on a terminal and as plain lines otherwise.

| exit code | means |
|---|---|
| 0 | ok |
| 1 | the service did not answer, or failed |
| 2 | usage, or refused input |
| 3 | the job failed |
| 4 | cancelled |
| 5 | timeout |
| 6 | credentials refused |

`quantize`, `evaluate`, `generate` and `bench` need torch and become `python -m bitmill ...`;
everything else is torch-free. `BITMILL_URL` names the service that the job commands talk to.
"""


def pages() -> Iterator[str]:
    """The document, heading by heading."""
    yield _HEAD
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        library = command.context_settings == PASS_ON
        yield _page([name], _library_help(name) if library else _help([name]))
    for group in app.registered_groups:
        assert group.name is not None
        assert group.typer_instance is not None
        for command in group.typer_instance.registered_commands:
            assert command.callback is not None
            path = [group.name, command.name or command.callback.__name__]
            yield _page(path, _help(path))


def _page(path: list[str], text: str) -> str:
    return f"## bitmill {' '.join(path)}\n```text\n{text.strip()}\n```\n"


def _help(path: list[str]) -> str:
    with redirect_stdout(StringIO()) as out:
        app([*path, "--help"], prog_name="bitmill", standalone_mode=False)
    return _trimmed(out.getvalue())


def _library_help(name: str) -> str:
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        library_command(name, ["--help"]),
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return _trimmed(done.stdout.replace("python -m bitmill ", "bitmill "))


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())


def main() -> None:
    """Print the document."""
    sys.stdout.write("\n".join(pages()))


if __name__ == "__main__":
    main()
