#!/usr/bin/env bash
# torch 2.13.0: `elastic_launch`, called from a program, leaves its signal handlers behind.
#
# `torch.distributed.launcher.api.elastic_launch` is what `torchrun` calls. While it runs, SIGTERM,
# SIGINT, SIGHUP and SIGQUIT raise `SignalException`. After it has returned they still do: Ctrl-C then
# raises no `KeyboardInterrupt` in the caller, SIGHUP no longer ends it in the usual way, and a handler
# that the caller had set is gone. Seen: four handlers replaced, none put back, no word about it.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install torch==2.13.0 numpy
"$work/venv/bin/python" - <<'PY'
import os
import signal
import sys
import tempfile

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
signal.signal(signal.SIGHUP, lambda *_: print("the caller's own handler"))
before = {name: signal.getsignal(getattr(signal, name)) for name in names}
with tempfile.TemporaryDirectory() as logs:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=1,
        run_id="finding",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
    )
    elastic_launch(config, sys.executable)("-c", "pass")
changed = [name for name in names if signal.getsignal(getattr(signal, name)) != before[name]]
print(f"torch {torch.__version__}: handlers after the launch that are not the caller's: {changed}")
try:
    os.kill(os.getpid(), signal.SIGINT)
    raised = "nothing"
except BaseException as error:
    raised = type(error).__name__
print(f"SIGINT raises {raised}")
assert changed == list(names) and raised == "SignalException", "the handlers are put back now"
PY
