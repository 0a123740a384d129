"""What a page's form sent."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import Depends, Request
from starlette.datastructures import ImmutableMultiDict

from bitmill_service.http.problems import ProblemError

Fields = ImmutableMultiDict[str, str]
_MOST_FIELDS = 1000


async def read_form(request: Request) -> Fields:
    """The fields of a form that a browser sent in the usual way; 415 for other bodies."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != "application/x-www-form-urlencoded":
        raise ProblemError(
            "unsupported_media_type", f"a page takes a form, not {given[:80] or 'this body'!r}"
        )
    body = await request.body()
    try:
        fields = parse_qsl(
            body.decode(), keep_blank_values=True, strict_parsing=False, max_num_fields=_MOST_FIELDS
        )
    except ValueError as error:
        raise ProblemError("malformed_request", f"the form cannot be read: {error}") from error
    return Fields(fields)


Form = Annotated[Fields, Depends(read_form)]


def text(form: Fields, name: str) -> str:
    """A field without the space around it; empty where there is none."""
    return form.get(name, "").strip()
