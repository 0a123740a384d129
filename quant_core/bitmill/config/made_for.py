"""The model that a bit-width map or a profile was made for. Torch-free.

It travels in a map's JSON as `made_for`, and lies as `made_for.json` beside the map of a packed
folder, whose own file stays as every reader knows it, and beside a stored profile. Maps of other
programs, and those from before it was kept, have none.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from bitmill.config.closed import Closed
from bitmill.errors import FormatError, reason

MADE_FOR_NAME = "made_for.json"
_HASH = r"^[0-9a-f]{64}$"


class MadeFor(Closed):
    """shape, weights: hex SHA-256, the model's fingerprint (`bitmill.plan.fingerprint`). model:
    what it was called where it was quantized, such as `org/name` or the name of its folder."""

    shape: str | None = Field(default=None, pattern=_HASH)
    weights: str | None = Field(default=None, pattern=_HASH)
    model: str | None = Field(default=None, max_length=4096)

    def __str__(self) -> str:
        kind, digest = ("weights", self.weights) if self.weights else ("shape", self.shape)
        known = f"{kind} {digest[:12]}" if digest else "unknown weights"
        return f"{self.model or 'a model without a name'} ({known})"

    def to_json(self) -> str:
        """Text of `made_for.json`."""
        told = self.model_dump(mode="json", exclude_none=True)
        return json.dumps({"schema_version": 1} | told, indent=2) + "\n"

    @classmethod
    def parse(cls, text: bytes) -> MadeFor:
        """What `to_json` gave; raises `FormatError` for anything else."""
        try:
            told = json.loads(text)
            if not isinstance(told, dict) or told.pop("schema_version", None) != 1:
                raise ValueError("schema_version is not 1")
            return cls.model_validate(told)
        except ValueError as error:
            raise FormatError(f"{MADE_FOR_NAME} cannot be read: {reason(error)}") from error

    @classmethod
    def beside(cls, folder: Path) -> MadeFor | None:
        """What lies in a folder, if anything does; raises as `parse` does."""
        file = folder / MADE_FOR_NAME
        return cls.parse(file.read_bytes()) if file.is_file() else None


def foreign_map(made_for: MadeFor | None, model: MadeFor) -> str | None:
    """What to tell whoever gives a map to a model that it was not made for; None where it was.

    made_for: of the map, None where it does not say; model: with the fingerprint of its weights.
    """
    if made_for is None:
        return f"the bit-width map does not say for which model it was made; it is used for {model}"
    if made_for.weights == model.weights:
        return None
    if made_for.weights is None:
        return (
            f"the bit-width map was made for {made_for}; whether that is {model}, for which it is "
            "used, cannot be told"
        )
    return (
        f"the bit-width map was made for {made_for}, not for {model}: its widths follow what was "
        "measured of the other model; without a map they are measured of this one"
    )
