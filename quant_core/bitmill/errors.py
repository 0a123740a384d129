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

Messages name the value, the limit and what to do, in one line that a terminal can show whatever
stands in the files that they tell of. `code` is part of the API: it never changes
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
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

_NO_MEMORY = re.compile(
    r"can(no|')?t allocate memory|out[ _]of[ _]memory|not enough memory|bad_alloc|OutOfMemory"
    r"|memory allocation of \d+ bytes failed|can't start new thread"
    r"|ThreadPoolBuildError|ALLOC_FAILED"
    r"|cudaErrorMemoryAllocation|CUBLAS_STATUS_NOT_INITIALIZED.*cublasCreate",
    re.IGNORECASE,
)
"""What torch's allocators, CUDA, its libraries (cuBLAS, cuDNN, cuSOLVER, ...), Triton, NCCL, C++,
Rust and ENOMEM as text say; cuBLAS calls it "not initialized" for want of room."""

_UNITS = {"bytes": 1, "B": 1} | {f"{c}iB": 1024**i for i, c in enumerate("KMGTPE", 1)}
_ASKED = re.compile(rf"allocate (?P<number>\d[\d.,]*) ?(?P<unit>{'|'.join(_UNITS)})\b")
"""How torch and numpy say what was asked for."""


_LONGEST = 2000
"""Characters of a message."""

STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What ends a process because it is to end."""


_REFERRING = ("as the message says.", "as `detail` says.", "/docs lists every parameter.")


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
        self.message = printable(message)
        super().__init__(self.message)
        self.code = code or type(self).code
        self.param = None if param is None else printable(param)
        self.hint = printable(hint) if hint else type(self).hint

    def add(self, more: str) -> None:
        """Say something more, behind what the message says."""
        self.message = f"{self.message.rstrip('.')}; {printable(more)}"
        self.args = (self.message, *self.args[1:])

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
    hint = "Correct the specification as the message says."


class BudgetError(InputError):
    """No legal bit-width map meets the budget."""

    code = "impossible_budget"
    hint = "Raise the budget, allow a smaller width or quantize fewer linears."


class ModelError(InputError):
    """A model's files are missing, unsafe, damaged or of an unsupported kind."""

    code = "invalid_model"
    hint = "Correct the model's files, or the reference to them, as the message says."


class CalibrationError(InputError):
    """Calibration data is missing, too short or makes the model produce non-finite values."""

    code = "invalid_calibration"
    hint = "Correct the calibration data or its settings as the message says."


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

    Whoever hands errors on takes any but `STOPS`: a panic in Rust is no Exception.

    A full disk and refused memory are a `ResourceError`, whoever met them; anything else is a
    fault of the program, code `internal`.
    """
    if isinstance(error, BitmillError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return disk_full(f"no space is left on the disk ({error.strerror})")
    refused = refused_memory(error)
    if refused is not None:
        return out_of_memory(f"memory ran out: {said_by(refused)}")
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


def out_of_memory(message: str) -> ResourceError:
    """Memory of an accelerator or of the host that was refused."""
    return ResourceError(
        message,
        code="out_of_memory",
        hint="Give a shorter calibration.length or fewer devices, or use a larger machine.",
    )


def refused_memory(error: BaseException) -> BaseException | None:
    """The error by which memory was refused: this one, or one that it was raised for."""
    if isinstance(error, BitmillError) and error.code != "out_of_memory":
        return None
    if isinstance(error, MemoryError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return error
    # The classes of torch, safetensors and Triton are not imported here; what they say tells them.
    if not isinstance(error, OSError | BitmillError) and _NO_MEMORY.search(str(error)):
        return error
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None if cause is None else refused_memory(cause)


def speaks_of_memory(text: str) -> str | None:
    """The line of a program's last words that says that memory was refused to it."""
    return next((line.strip() for line in text.splitlines() if _NO_MEMORY.search(line)), None)


def said_by(error: BaseException) -> str:
    """The first line of an error of others, or its class; no path that an OSError names."""
    lines = reason(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def asked_bytes(refused: BaseException) -> int | None:
    """How much memory was asked for when it was refused, where the error says so."""
    found = _ASKED.search(str(refused))
    if found is None:
        return None
    return int(float(found["number"].replace(",", "")) * _UNITS[found["unit"]])


def absent(path: Path) -> str:
    """That a file is not there, in words; of the folders above it only the last is named."""
    folder = path.parent
    if folder.is_dir():
        return f"{folder.name or 'this folder'} holds no {path.name}"
    return f"there is no folder {folder.name or folder}, and so no {path.name} in it"


def reason(error: BaseException) -> str:
    """What went wrong, without the path that an OSError names: a client may read the message."""
    from pydantic import ValidationError  # not where a program merely imports this package

    if isinstance(error, ValidationError):
        where, problem = first_problem(error)
        return f"{where}: {problem}" if where else problem
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Where pydantic found the first, dotted, and what."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    told = first["msg"].removeprefix("Value error, ")
    return ".".join(str(part) for part in first["loc"]), told


def advice(hint: str | None) -> str | None:
    """A hint for people, who read it behind the message: None where it only refers to that."""
    return None if hint is not None and hint.endswith(_REFERRING) else hint


def printable(text: str) -> str:
    """One line: white space as blanks, other control characters escaped, too much left out."""
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}…"
    if text.isprintable():
        return text
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
