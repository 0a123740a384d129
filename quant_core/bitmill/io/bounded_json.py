"""JSON that a stranger wrote, decoded within bounds. Torch-free.

What decoded JSON takes in memory and time grows with its values, not with its bytes: three bytes
`[],` become a list of 64. Every value but the first of its list or object stands behind a comma,
and every list and object behind its bracket, so counting those three marks bounds the values before
any is made. Marks inside strings are counted as well.
"""

from __future__ import annotations

import json
from typing import Any

_MARKS = (b"[", b"{", b",")


def loads(text: bytes, most: int | None = None) -> Any:
    """The value of a JSON document. most: marks that it may have; None of the caller's own.

    Raises ValueError for more, for anything that is no JSON, for a name that stands twice in an
    object, and for nesting deeper than Python's decoder goes.
    """
    marks = 0 if most is None else sum(map(text.count, _MARKS))
    if most is not None and marks > most:
        raise ValueError(f"it holds {marks:,} lists, objects and commas, the limit is {most:,}")
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def shown(value: Any, most: int = 40) -> str:
    """The first characters of a value as it stood in a document: `"64"` is not 64."""
    return json.dumps(value)[:most]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"name {name[:100]!r} appears twice")
            seen.add(name)
    return result
