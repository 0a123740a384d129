"""Connections to PostgreSQL that give up on a server which says nothing.

A server that is frozen, or whose disk hangs, keeps its connections: its kernel acknowledges what is
sent, so neither keepalives nor `tcp_user_timeout` end the wait, and libpq waits for ever. Here the
wait ends with an `OperationalError`, the connection is closed, and the server undoes whatever was
not committed when it goes on.
"""

from __future__ import annotations

import time
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.abc import PQGen

CONNECT_S = 5
"""A new connection is made within so long."""
IDLE_S = 5.0
"""What a pooled connection is asked before it is used is answered within so long."""
STATEMENT_S = 30
"""The server ends a statement that takes longer."""
SILENCE_S = STATEMENT_S + 5.0
"""Without a word of the server for so long a statement has failed."""
HOLD_S = 1.0
"""For so long nobody tries to connect to a server that let a connection wait for `CONNECT_S`, so
that many requests do not wait for it one behind another."""


class PatientConnection(psycopg.Connection[Any]):
    """Waits for the server for `patience` seconds at most."""

    patience = IDLE_S

    def wait(self, gen: PQGen[Any], *args: Any, **options: Any) -> Any:
        """What psycopg does in here, which it leaves every 0.1 s while nothing comes."""
        return super().wait(self._watched(gen), *args, **options)

    def _watched(self, gen: PQGen[Any]) -> PQGen[Any]:
        heard = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if ready:
                    heard = time.monotonic()
                elif time.monotonic() - heard > self.patience:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(
                        f"the database has said nothing for {self.patience:g} s"
                    )
                wanted = gen.send(ready)
        except StopIteration as ended:
            return ended.value


def create_engine(url: sa.URL) -> sa.Engine:
    """An engine whose calls end within a minute, whatever becomes of the server."""
    engine = sa.create_engine(
        url,
        pool_pre_ping=True,
        pool_size=5,
        max_overflow=20,
        pool_timeout=10,
        connect_args={
            "connect_timeout": CONNECT_S,
            "options": f"-c statement_timeout={STATEMENT_S * 1000}",
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 15000,
        },
    )
    held_until = 0.0

    @sa.event.listens_for(engine, "do_connect")
    def _connect(_: Any, __: Any, args: list[Any], options: dict[str, Any]) -> PatientConnection:
        nonlocal held_until
        if time.monotonic() < held_until:
            raise psycopg.OperationalError("the database did not answer a moment ago")
        try:
            return PatientConnection.connect(*args, **options)
        except psycopg.errors.ConnectionTimeout:
            held_until = time.monotonic() + HOLD_S
            raise

    @sa.event.listens_for(engine, "checkout")
    def _on_use(connection: PatientConnection, *_: object) -> None:
        connection.patience = SILENCE_S

    @sa.event.listens_for(engine, "checkin")
    def _on_return(connection: PatientConnection | None, *_: object) -> None:
        if connection is not None:
            connection.patience = IDLE_S

    return engine
