"""Every error that Bitmill raises on purpose.

    BitmillError                 base; carries a stable `code` and the `param` at fault
    ├── InputError               the caller's input is refused (exit code 2, HTTP 422)
    │   ├── SpecError            a job specification breaks a rule
    │   ├── BudgetError          the budget cannot be met
    │   ├── ModelError           a model's files are missing, unsafe or unsupported
    │   ├── CalibrationError     calibration data is missing, too short or non-finite
    │   └── FormatError          a stored file is damaged or of an unknown version
    ├── NumericalError           a computation failed where no fallback is allowed
    ├── ResourceError            disk or memory ran out; the work itself is sound
    ├── VerificationError        a written checkpoint does not match what was computed
    └── Cancelled                the caller asked the work to stop

Messages name the value, the limit and what to do. `code` is part of the API: it never changes
its meaning, while messages may be reworded.
"""

from __future__ import annotations


class BitmillError(Exception):
    """Base of all deliberate errors.

    `code` is a stable snake_case identifier; `param` names the offending field or file.
    """

    code = "error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param


class InputError(BitmillError):
    """The caller's input is refused."""

    code = "invalid_input"


class SpecError(InputError):
    """A job specification breaks a rule."""

    code = "invalid_spec"


class BudgetError(InputError):
    """No legal bit-width map meets the budget."""

    code = "impossible_budget"


class ModelError(InputError):
    """A model's files are missing, unsafe, damaged or of an unsupported kind."""

    code = "invalid_model"


class CalibrationError(InputError):
    """Calibration data is missing, too short or makes the model produce non-finite values."""

    code = "invalid_calibration"


class FormatError(InputError):
    """A stored file is damaged or of an unknown schema version."""

    code = "invalid_format"


class NumericalError(BitmillError):
    """A computation failed where no fallback is allowed."""

    code = "numerical"


class ResourceError(BitmillError):
    """Disk or memory ran out."""

    code = "resource"


class VerificationError(BitmillError):
    """A written checkpoint does not match what was computed."""

    code = "verification"


class Cancelled(BitmillError):
    """The caller asked the work to stop."""

    code = "cancelled"


def reason(error: BaseException) -> str:
    """What went wrong, without the path that an OSError names: a client may read the message."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
