"""`python -m bitmill`: see `cli.py`."""

import sys

from bitmill.cli import main

sys.exit(main(sys.argv[1:]))
