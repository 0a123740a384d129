"""What follows the end of an attempt: one table from the error to the supervisor's next step.

| error | then |
|---|---|
| refused input, numerical error, verification failed | the job fails at once |
| disk full, machine too small | the job fails at once |
| out of memory, of an accelerator or of the host | once more on the next memory tier |
| a process killed, crashed or silent, object store or Hub away | once more, then it fails |
"""

from __future__ import annotations

from enum import Enum

from bitmill.errors import (
    BitmillError,
    InputError,
    NumericalError,
    ResourceError,
    VerificationError,
)


class Then(Enum):
    """What the supervisor does with a job whose attempt failed."""

    FAIL = "running it again would end the same way"
    LARGER = "again with more memory"
    AGAIN = "again"


_BY_CODE = {
    "out_of_memory": Then.LARGER,
    "killed": Then.AGAIN,
    "storage_unavailable": Then.AGAIN,
    "hub_unavailable": Then.AGAIN,
}


def then(error: BitmillError) -> Then:
    """What follows this end of an attempt."""
    if isinstance(error, ResourceError):
        return _BY_CODE.get(error.code, Then.FAIL)
    final = isinstance(error, InputError | NumericalError | VerificationError)
    return Then.FAIL if final else Then.AGAIN
