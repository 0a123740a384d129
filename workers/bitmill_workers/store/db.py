"""Engine and transactions: one code path for SQLite and PostgreSQL.

SQLite: WAL, and BEGIN IMMEDIATE for every writing transaction, because a deferred one that turns
into a writer fails with "database is locked" whatever the busy timeout is. `db_now()` is the
database's clock on both, so leases do not depend on the clocks of workers.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction

from bitmill.errors import disk_full
from bitmill_workers.errors import StoreUnavailable

BUSY_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 30.0
_STEP_MS = 8

DATABASE_ERRORS = (sa.exc.DBAPIError, sa.exc.TimeoutError)
"""What a database that is away raises: it refuses, or all connections wait for its answer."""


@contextmanager
def errors_told(url: str) -> Iterator[None]:
    """Raise `StoreUnavailable`, or `ResourceError` for a full disk, where the database cannot be
    used, for people who start something with it. The message has the URL without its password."""
    try:
        yield
    except (*DATABASE_ERRORS, sqlite3.Error) as error:
        met = getattr(error, "orig", None) or error
        if getattr(met, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            raise disk_full("the disk of the database is full") from error
        said = " ".join(str(met).split()) or type(met).__name__
        raise StoreUnavailable(
            f"the database {sa.make_url(url).render_as_string()} cannot be used: {said}",
            hint="See that it runs and is whole; `bitmill doctor` looks at it.",
        ) from error


class db_now(GenericFunction[float]):  # noqa: N801  (an SQL function's name)
    """Seconds since the epoch by the database's clock."""

    type = sa.Double()
    inherit_cache = True


@compiles(db_now, "sqlite")
def _now_sqlite(element: db_now, compiler: Any, **_: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(db_now, "postgresql")
def _now_postgresql(element: db_now, compiler: Any, **_: Any) -> str:
    return "CAST(extract(epoch FROM statement_timestamp()) AS double precision)"


class larger(GenericFunction[Any]):  # noqa: N801  (an SQL function's name)
    """The larger of two values that are not NULL."""

    inherit_cache = True


@compiles(larger, "sqlite")
def _larger_sqlite(element: larger, compiler: Any, **options: Any) -> str:
    return f"max({compiler.process(element.clauses, **options)})"


@compiles(larger, "postgresql")
def _larger_postgresql(element: larger, compiler: Any, **options: Any) -> str:
    return f"greatest({compiler.process(element.clauses, **options)})"


class Database:
    """A job database; safe to share between threads, not across a fork."""

    def __init__(self, url: str) -> None:
        self.url = sa.make_url(url)
        if self.url.get_backend_name() == "sqlite":
            self.engine = _sqlite_engine(self.url)
        else:
            from bitmill_workers.store.postgres import create_engine  # psycopg is an extra

            self.engine = create_engine(self.url)

    @property
    def dialect(self) -> Literal["sqlite", "postgresql"]:
        """Which of the two databases this is."""
        return cast(Literal["sqlite", "postgresql"], self.engine.dialect.name)

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that may write; commits at the end of the block."""
        with self.engine.connect().execution_options(bitmill_write=True) as conn, conn.begin():
            yield conn

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A transaction that only reads: one consistent view."""
        with self.engine.connect() as conn, conn.begin():
            yield conn

    def insert(self, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
        """An INSERT that knows ON CONFLICT."""
        return sqlite.insert(table) if self.dialect == "sqlite" else postgresql.insert(table)

    def now(self) -> float:
        """The database's clock."""
        with self.read() as conn:
            return float(conn.execute(sa.select(db_now())).scalar_one())

    def close(self) -> None:
        """Close all pooled connections."""
        self.engine.dispose()


def _sqlite_engine(url: sa.URL) -> sa.Engine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None
        for pragma in ("synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        _enable_wal(connection)

    @sa.event.listens_for(engine, "begin")
    def _on_begin(conn: sa.Connection) -> None:
        if conn.get_execution_options().get("bitmill_write", False):
            _begin_immediate(conn)
        else:
            conn.exec_driver_sql("BEGIN")

    return engine


def _begin_immediate(conn: sa.Connection) -> None:
    """Take the write lock. All writers wait alike in short steps, so that none starves.

    SQLite's own waiting backs off to 100 ms, and a writer that has waited long loses to those that
    have just come.
    """
    raw = cast(sqlite3.Connection, conn.connection.dbapi_connection)
    deadline = time.monotonic() + WRITE_TIMEOUT_S
    raw.execute(f"PRAGMA busy_timeout={_STEP_MS}")
    try:
        while time.monotonic() < deadline:
            try:
                raw.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    break
        conn.exec_driver_sql("BEGIN IMMEDIATE")
    finally:
        raw.execute(f"PRAGMA busy_timeout={int(BUSY_TIMEOUT_S * 1000)}")


def _enable_wal(connection: sqlite3.Connection) -> None:
    """Switching to WAL needs an exclusive lock, for which SQLite ignores the busy timeout."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
