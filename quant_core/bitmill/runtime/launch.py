"""Starting the ranks of one job with torchrun's own launcher, and ending them all.

The launcher (`torch.distributed.launcher`, what `torchrun --standalone` calls) runs in the process
that asks, on a port that the system chooses. It starts every rank once; when one ends with an
error it ends the others. Ranks live in sessions of their own, so each asks the kernel to be killed
with the launcher, and none outlives it.

A rank that fails leaves what it raised in the file that torchrun gives it; the launcher raises the
first rank's own reason again as the same `BitmillError`, or says how a rank died without one
(`child.death`, code `rank_failed`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bitmill.errors import STOPS, BitmillError, ResourceError, as_bitmill_error, disk_full
from bitmill.runtime.child import death
from bitmill.runtime.forks import PARENT
from bitmill.runtime.lifetime import die_with_parent
from bitmill.runtime.process import environment, settle_own_process

if TYPE_CHECKING:
    import torch

    from bitmill.runtime.ranks import Ranks

_LAUNCHER = "BITMILL_LAUNCHER"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_LOOPBACK = "127.0.0.1"
_ENDING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
"""Signals on which the launcher ends all ranks."""
_DISK_FULL = os.EX_IOERR
"""Exit status of a rank that could not even write down why it failed."""
_GRACE_S = 30.0
"""How long a rank that lost another one waits to be ended, so that the other's reason is found."""


def check_devices(count: int, device: str) -> None:
    """Raise `ResourceError` where the machine has fewer than `count` accelerators (CPU cores)."""
    import torch

    cuda = torch.device(device).type == "cuda"
    there = torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0))
    if count <= there:
        return
    name = f" ({torch.cuda.get_device_name(0)})" if cuda and there else ""
    raise ResourceError(
        f"the job asks for {count} devices, this machine has {there} "
        f"{'accelerators' if cuda else 'CPU cores'}{name}: lower `devices` or use a larger machine",
        code="too_few_devices",
        param="devices",
    )


def run_ranks(count: int, arguments: Sequence[str]) -> None:
    """Run `python <arguments>` as `count` ranks and wait for all.

    Standard input, output and error are this process's. Threads (OMP_NUM_THREADS) are divided.
    Raises the `BitmillError` of the rank that failed first, or the one of its death; a signal ends
    all and then this process. No rank is left in any case.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
    told = {
        _LAUNCHER: str(os.getpid()),
        PARENT: str(os.getpid()),
        "OMP_NUM_THREADS": str(max(1, threads // count)),
        "MKL_NUM_THREADS": str(max(1, threads // count)),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    folder = tempfile.TemporaryDirectory(prefix="bitmill-ranks-")
    with environment(told), _handlers_kept(), folder as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{_LOOPBACK}:0",
            local_addr=_LOOPBACK,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            signals_to_handle=",".join(_ENDING),
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from None
        except ChildFailedError as error:
            raise _reason(error.failures, count) from error


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Put back the caller's signal handlers: torch's launcher sets its own and leaves them.

    Its handlers raise `SignalException` where Python raises `KeyboardInterrupt`. Outside the main
    thread the launcher sets none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {name: signal.getsignal(getattr(signal, name)) for name in _ENDING}
    try:
        yield
    finally:
        for name, handler in before.items():
            if handler is not None:  # None: set by a library in C, which Python cannot put back
                signal.signal(getattr(signal, name), handler)


def _reason(failures: dict[int, Any], count: int) -> BitmillError:
    """What the first rank that told its reason raised; else how the first one died.

    SIGTERM is how the launcher ends the others.
    """
    for _, failure in sorted(failures.items()):
        if "error" in failure.error_file_data:
            return BitmillError.from_dict(failure.error_file_data["error"])
    rank, failure = min(failures.items(), key=lambda one: one[1].exitcode == -signal.SIGTERM)
    if failure.exitcode == _DISK_FULL:
        return disk_full(f"no space is left on the disk of rank {rank} of {count}")
    return death(f"rank {rank} of {count}", failure.exitcode, code="rank_failed")


@contextmanager
def as_rank(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """Be one of the ranks that `run_ranks` or torchrun started: group and device of this process.

    In a process that was started alone it is a group of one, and errors pass through. A rank's
    process ends here: what is left of an interpreter with gloo's threads in it may abort. Its
    errors are left for the launcher. Settings of the process come first (`process.py`).
    """
    if is_rank():
        die_with_parent(parent=int(os.environ[PARENT]))
    from bitmill.runtime.ranks import PeerLost, joined

    settle_own_process()
    if not is_rank():
        with joined(device) as found:
            yield found
        return
    try:
        with joined(device) as found:
            yield found
    except PeerLost:
        time.sleep(_GRACE_S)
        _end(1)
    except STOPS:
        raise
    except BaseException as error:  # noqa: BLE001  (the boundary of the process)
        _end(_leave_reason(error))
    _end(0)


def _end(status: int) -> NoReturn:
    with suppress(OSError):  # the log may lie on a disk that is full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def is_rank() -> bool:
    """Whether `run_ranks` started this process."""
    return _LAUNCHER in os.environ


def _leave_reason(error: BaseException) -> int:
    """Leave what was raised for the launcher; the exit status, which tells of a disk too full."""
    known = as_bitmill_error(error)
    left = {"message": known.message, "timestamp": int(time.time()), "error": known.to_dict()}
    file = Path(os.environ[_ERROR_FILE])
    try:
        file.write_text(json.dumps(left))
    except OSError:
        file.unlink(missing_ok=True)  # half of it would hide the rank's end from the launcher
        return _DISK_FULL
    if known is not error:
        traceback.print_exc()
    return 1
