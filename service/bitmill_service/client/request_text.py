"""Texts of a caller where they become part of a request's line or head.

An id that is empty, or that holds a slash, would name another resource, and a text that no header
can hold would end up in a message of the HTTP library, keys included.
"""

from __future__ import annotations

import re

from bitmill.errors import InputError

_SEGMENT = re.compile(r"[A-Za-z0-9_.~%@+-]+")
_HEADER = re.compile(r"[ -~]+")


def checked_path(path: str) -> str:
    """The path of a resource; raises `InputError` unless every part of it is one plain word."""
    for part in path.split("/")[1:]:
        if part in (".", "..") or not _SEGMENT.fullmatch(part):
            found = repr(part) if part else "an empty text"
            raise InputError(
                f"{path!r}: {found} is no id: give one as the service's lists show it",
                code="bad_id",
                param=part,
            )
    return path


def checked_header(text: str, what: str) -> str:
    """A text for a header; raises `InputError`, which does not repeat it: it may be secret."""
    if not _HEADER.fullmatch(text):
        odd = next(
            (f"character {i}" for i, sign in enumerate(text, 1) if not " " <= sign <= "~"), ""
        )
        raise InputError(
            f"{what} of {len(text)} characters cannot be sent: {odd or 'it'} is no printable "
            "ASCII; copy it again",
            code="bad_header",
            param=what,
        )
    return text
