"""How the end of a runner is classified; the supervisor's policy for each class is one table.

| exit | class | then |
|---|---|---|
| 0 | ok | publish; without a whole output the job fails at once |
| 10 | input error | the job fails at once |
| 11 | numerical error | the job fails at once |
| 12 | verification failed | the job fails at once |
| 13 | disk full, or the machine too small | the job fails at once |
| 42 | accelerator out of memory | once more on the next memory tier |
| other, signals | crash | once more, then the job fails |
"""

from __future__ import annotations

import errno
from enum import IntEnum

from bitmill.errors import (
    BitmillError,
    InputError,
    NumericalError,
    ResourceError,
    VerificationError,
)


class Exit(IntEnum):
    """Exit codes of the runner and of the fetcher."""

    OK = 0
    CRASH = 1
    INPUT = 10
    NUMERICAL = 11
    VERIFICATION = 12
    RESOURCE = 13
    OUT_OF_MEMORY = 42


FINAL = frozenset({Exit.INPUT, Exit.NUMERICAL, Exit.VERIFICATION, Exit.RESOURCE})
"""Running the same job again would end the same way."""

_CLASSES: tuple[tuple[type[BitmillError], Exit], ...] = (
    (InputError, Exit.INPUT),
    (NumericalError, Exit.NUMERICAL),
    (VerificationError, Exit.VERIFICATION),
    (ResourceError, Exit.RESOURCE),
)


def classify(error: BaseException) -> tuple[Exit, str, str, str | None]:
    """Exit code, error code, message and parameter for an exception that ended a runner."""
    if isinstance(error, BitmillError):
        if error.code == "storage_unavailable":
            return Exit.CRASH, error.code, error.message, error.param
        if error.code == "accelerator_out_of_memory":
            return Exit.OUT_OF_MEMORY, "out_of_memory", error.message, None
        for kind, exit_code in _CLASSES:
            if isinstance(error, kind):
                return exit_code, error.code, error.message, error.param
        return Exit.CRASH, error.code, error.message, error.param
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        message = f"no space left on the worker's disk ({error.strerror})"
        return Exit.RESOURCE, "disk_full", message, None
    # torch is not imported here; its class is told by name.
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
        return Exit.OUT_OF_MEMORY, "out_of_memory", str(error).partition("\n")[0], None
    return Exit.CRASH, "internal", f"{type(error).__name__}: {error}", None


def describe(status: int) -> str:
    """A child's return code in words."""
    if status >= 0:
        return f"the runner ended with exit code {status}"
    hint = " (often: out of host memory)" if status == -9 else ""
    return f"the runner was ended by signal {-status}{hint}"
