"""`bitmill` and `python -m bitmill_service.cli`: see `main.py`, which takes a while to load."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it loads ends it as quietly as later."""
    try:
        from bitmill_service.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
