"""What a job that has not finished needs: uploads, files of other jobs, uploaded maps.

A job names them in its specification. Until it has finished it may be queued again, after a lost
worker say, and fetch them anew, so none of them is deleted before. A submission holds what it
names, and a deletion locks what it removes before it looks for jobs: on PostgreSQL the one that
comes second waits for the other and sees what that did. SQLite has one writer at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from bitmill.config.quantization import Refinement
from bitmill.errors import InputError
from bitmill_workers.errors import StateConflict
from bitmill_workers.job_spec import JobKind
from bitmill_workers.store.states import TERMINAL
from bitmill_workers.store.tables import bit_width_maps, jobs, uploads

Needed = Literal["upload", "job", "map"]
Place = tuple[str, ...]

_LEARNED: Place = tuple(Refinement.place("resume_parameters").split("."))
_CARD: Place = ("packed_job",)
"""Whose report a push shows, and does without where that job's files are gone."""

_NAMED: Mapping[JobKind, Mapping[Needed, tuple[Place, ...]]] = {
    "quantize": {
        "upload": (("model", "upload_id"), (*_LEARNED, "upload_id")),
        "job": (("allocation", "map", "job_id"), (*_LEARNED, "job_id")),
        "map": (("allocation", "map", "map_id"),),
    },
    "export": {"job": (("job_id",),)},
    "push": {"job": (("job_id",), _CARD)},
}
"""Where the stored specification of a job of each kind names what it needs."""

_TABLES: Mapping[Needed, sa.Table] = {"upload": uploads, "job": jobs, "map": bit_width_maps}


@dataclass(frozen=True, slots=True)
class User:
    """An unfinished job that needs something."""

    job_id: str
    tenant: str


def hold(conn: sa.Connection, kind: JobKind, spec: Mapping[str, Any]) -> None:
    """Keep what a new job names from being deleted until the transaction has ended.

    Raises `InputError` (codes `upload_not_found`, `job_not_found`, `map_not_found`,
    `files_discarded`) where it went after the job was admitted.
    """
    named = [
        (what, found, place)
        for what, places in _NAMED[kind].items()
        for place in places
        if (found := _at(spec, place)) is not None
    ]
    for what, found, place in sorted(named):
        table = _TABLES[what]
        query = sa.select(table.c["discarded_at" if what == "job" else "id"])
        query = query.where(table.c.id == found)
        row = conn.execute(query.with_for_update(read=True, key_share=True)).one_or_none()
        param = ".".join(place)
        if row is None:
            raise InputError(f"{what} {found!r} was deleted", code=f"{what}_not_found", param=param)
        if what == "job" and row[0] is not None and place != _CARD:
            raise InputError(
                f"the files of job {found!r} were discarded", code="files_discarded", param=param
            )


def users(conn: sa.Connection, what: Needed) -> dict[str, User]:
    """By id of everything of this sort that unfinished jobs need: one of these jobs."""
    found: dict[str, User] = {}
    for kind, named in _NAMED.items():
        for place in named.get(what, ()):
            needed = jobs.c.spec[place].as_string()
            query = sa.select(needed.label("needed"), jobs.c.id, jobs.c.tenant).where(
                jobs.c.state.not_in(sorted(TERMINAL)), jobs.c.kind == kind, needed.is_not(None)
            )
            for row in conn.execute(query):
                found.setdefault(row.needed, User(row.id, row.tenant))
    return found


def refuse_needed(
    conn: sa.Connection, what: Needed, ids: Collection[str], tenant: str | None
) -> None:
    """Raise `StateConflict` (code `upload_in_use`, `job_in_use` or `map_in_use`) where an
    unfinished job needs one of these, whose rows the transaction must have locked.

    tenant: who is told; None: somebody who sees the jobs of all.
    """
    needed = users(conn, what)
    for one in ids:
        if one in needed:
            raise in_use(what, one, needed[one], tenant)


def in_use(what: str, named: str, user: User, tenant: str | None) -> StateConflict:
    """The refusal to delete something that a job needs."""
    who = f"job {user.job_id}" if tenant in (None, user.tenant) else "a job of another tenant"
    return StateConflict(f"{who} needs {what} {named}", code=f"{what}_in_use")


def _at(spec: Mapping[str, Any], place: Place) -> str | None:
    found: Any = spec
    for name in place:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, str) else None
