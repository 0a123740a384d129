"""One rank of a job on several devices, started by the runner's launcher.

`python -m bitmill_workers.execution.rank <request> <result>`: descriptor 0 is the runner's message
pipe, on which the first rank reports progress; it writes the result as JSON when the job is done.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

from bitmill.runtime.launch import as_rank
from bitmill_workers.execution.child import Emitter


def main(argv: list[str]) -> int:
    """Work on the job with the other ranks."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    emit = Emitter(os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    request = json.loads(Path(argv[0]).read_bytes())
    with as_rank(request["device"]) as (group, device):
        from bitmill_workers.execution.runner import run_pipeline

        result = run_pipeline(request, emit, device, group)
        if group.first:
            Path(argv[1]).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
