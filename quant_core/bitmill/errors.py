"""Every error that Bitmill raises on purpose.

    BitmillError                 base; carries a stable `code`, the `param` at fault and a `hint`
    ├── InputError               the caller's input is refused (exit code 2, HTTP 422)
    │   ├── SpecError            a job specification breaks a rule
    │   ├── BudgetError          the budget cannot be met
    │   ├── ModelError           a model's files are missing, unsafe or unsupported
    │   ├── CalibrationError     calibration data is missing, too short or non-finite
    │   └── FormatError          a stored file is damaged or of an unknown version
    ├── NumericalError           a computation failed where no fallback is allowed
    ├── ResourceError            disk or memory ran out; the work itself is sound
    ├── VerificationError        a written checkpoint does not match what was computed
    ├── ProcessFailed            a process of the job died without a reason of its own
    └── Cancelled                the caller asked the work to stop

Messages name the value, the limit and what to do. `code` is part of the API: it never changes
its meaning, while messages may be reworded. Codes of `ResourceError` that decide what a worker
does next:

    out_of_memory        memory of an accelerator or of the host was refused to a process
    killed               a process was ended by a signal from outside, as the kernel does for memory
    disk_full            the disk, a quota or a limit on file sizes has no room
    storage_unavailable  the object store does not answer

An error goes between processes, into the job store and over HTTP as `to_dict`, and comes out of
`from_dict` as the class it was.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from typing import Any

_NO_MEMORY = (
    "can't allocate memory",  # torch on a CPU
    "Cannot allocate memory",  # ENOMEM as text, from libraries that cannot be loaded
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class BitmillError(Exception):
    """Base of all deliberate errors.

    `code` is a stable snake_case identifier; `param` names the offending field or file; `hint`
    says what to do about errors of its kind.
    """

    code = "error"
    hint: str | None = None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.hint = hint or type(self).hint

    def to_dict(self) -> dict[str, str | None]:
        """Strings that `from_dict` makes the same error of.

        kind: the class below its bases, such as "InputError.ModelError".
        """
        classes = [c.__name__ for c in type(self).__mro__ if issubclass(c, BitmillError)]
        return {
            "kind": ".".join(reversed(classes[:-1])) or classes[-1],
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "hint": self.hint,
        }

    @staticmethod
    def from_dict(told: Mapping[str, Any]) -> BitmillError:
        """The error that `to_dict` described.

        A class that this process does not know, such as one of a newer version, becomes the
        nearest of its bases that it knows; the code stays. A missing member is left out.
        """
        known = {kind.__name__: kind for kind in _below(BitmillError)}
        names = reversed(str(told.get("kind")).split("."))
        kind = next((known[name] for name in names if name in known), BitmillError)
        error = kind.__new__(kind)  # a class may want other arguments than these
        BitmillError.__init__(
            error,
            str(told.get("message") or "no reason was given"),
            code=_text(told.get("code")),
            param=_text(told.get("param")),
            hint=_text(told.get("hint")),
        )
        return error


def _below(kind: type[BitmillError]) -> Iterator[type[BitmillError]]:
    for below in kind.__subclasses__():
        yield below
        yield from _below(below)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


class InputError(BitmillError):
    """The caller's input is refused."""

    code = "invalid_input"
    hint = "Correct the request as the message says."


class SpecError(InputError):
    """A job specification breaks a rule."""

    code = "invalid_spec"
    hint = "Correct the field that `param` names."


class BudgetError(InputError):
    """No legal bit-width map meets the budget."""

    code = "impossible_budget"
    hint = "Raise the budget, allow a smaller width or quantize fewer linears."


class ModelError(InputError):
    """A model's files are missing, unsafe, damaged or of an unsupported kind."""

    code = "invalid_model"
    hint = "Check the model reference, and that the folder holds safetensors or GGUF."


class CalibrationError(InputError):
    """Calibration data is missing, too short or makes the model produce non-finite values."""

    code = "invalid_calibration"
    hint = "Give a longer calibration text, or fewer or shorter sequences."


class FormatError(InputError):
    """A stored file is damaged or of an unknown schema version."""

    code = "invalid_format"
    hint = "Check that the file is complete and of a supported version."


class NumericalError(BitmillError):
    """A computation failed where no fallback is allowed."""

    code = "numerical"
    hint = "Report this with the job's log; other calibration data may help."


class ResourceError(BitmillError):
    """Disk or memory ran out."""

    code = "resource"
    hint = "Free what the message names, or use a larger machine, then retry."


class VerificationError(BitmillError):
    """A written checkpoint does not match what was computed."""

    code = "verification"
    hint = "Report this with the job's log; do not use the checkpoint."


class ProcessFailed(BitmillError):
    """A process of the job died without a reason of its own: a fault of the program."""

    code = "process_failed"
    hint = "Report this with the job's log."


class Cancelled(BitmillError):
    """The caller asked the work to stop."""

    code = "cancelled"
    hint = "Retry the job if it should run after all."


def as_bitmill_error(error: BaseException) -> BitmillError:
    """The error itself, or what stands for one that the machine or a fault of ours raised.

    A full disk and refused memory are a `ResourceError`, whoever met them; anything else is a
    fault of the program, code `internal`.
    """
    if isinstance(error, BitmillError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return disk_full(f"no space is left on the disk ({error.strerror})")
    if _lacks_memory(error):
        return _out_of_memory(error)
    return ProcessFailed(f"{type(error).__name__}: {error}", code="internal")


def raise_resource_error(error: BaseException) -> None:
    """Raise the `ResourceError` where the machine lacked something; any other error is left.

    Call it before an error of other libraries is told as a fault of what they were given.
    """
    if isinstance(error, ResourceError):
        raise error
    known = as_bitmill_error(error)
    if isinstance(known, ResourceError):
        raise known from error


def disk_full(message: str) -> ResourceError:
    """A disk, quota or limit on file sizes that has no room."""
    return ResourceError(message, code="disk_full", hint="Free some disk space, then retry.")


def _out_of_memory(error: BaseException) -> ResourceError:
    """Memory was refused: what torch, numpy, CUDA or the system said tells where."""
    said = next(iter(str(error).splitlines()), type(error).__name__)
    return ResourceError(
        f"memory ran out: {said}",
        code="out_of_memory",
        hint="Give a shorter calibration.length or fewer devices, or use a larger machine.",
    )


def _lacks_memory(error: BaseException) -> bool:
    # torch is not imported here; its classes are told by name.
    torch = type(error).__module__.partition(".")[0] == "torch"
    if isinstance(error, MemoryError) or (torch and type(error).__name__ == "OutOfMemoryError"):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    library = isinstance(error, RuntimeError | ImportError)
    return library and any(words in str(error) for words in _NO_MEMORY)


def reason(error: BaseException) -> str:
    """What went wrong, without the path that an OSError names: a client may read the message."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
