"""Commands about API keys: make, list and revoke them, and keep one's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from bitmill.errors import InputError
from bitmill_service.cli.operate import operators_database
from bitmill_service.cli.output import (
    JsonFlag,
    UrlOption,
    format_time,
    open_client,
    print_json,
    print_table,
)
from bitmill_service.cli.service import DataOption
from bitmill_service.client.client import Client
from bitmill_service.client.credentials import keep_key
from bitmill_service.schemas import KeyRequest, KeyView
from bitmill_service.units import parse_size
from bitmill_workers.errors import KeyNotFound

if TYPE_CHECKING:
    from bitmill_service.settings import ServiceSettings
    from bitmill_workers.store.keys import KeyStore

keys = typer.Typer(help="Make, list and revoke API keys.", rich_markup_mode=None)

OfService = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="Ask the service there, with an admin's key; default: the "
        "database of the data folder or of BITMILL_DATABASE_URL.",
    ),
]
KeyArgument = Annotated[str, typer.Argument(metavar="KEY_ID", help="The 8 characters of a key.")]
_DAY = 86400


@keys.command("create")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who will use the key.")],
    *,
    scopes: Annotated[
        str, typer.Option(help="read, submit, admin; comma-separated.")
    ] = "read,submit",
    tenant: Annotated[
        str | None, typer.Option(help="Whose jobs the key works on; default NAME.")
    ] = None,
    days: Annotated[
        int | None, typer.Option(min=1, help="Days until the key expires; default never.")
    ] = None,
    keep_days: Annotated[
        float | None, typer.Option(help="Days that files of its jobs are kept.")
    ] = None,
    keep_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes of results, over which the oldest go."),
    ] = None,
    rate: Annotated[
        int | None, typer.Option(min=1, help="Calls a minute; default the service's.")
    ] = None,
    queued: Annotated[int | None, typer.Option(min=0, help="Jobs that may wait.")] = None,
    running: Annotated[int | None, typer.Option(min=0, help="Jobs that may run at once.")] = None,
    size: Annotated[
        str | None, typer.Option("--bytes", metavar="SIZE", help="Kept bytes, e.g. 500GB.")
    ] = None,
    priorities: Annotated[
        str, typer.Option(metavar="LOW:HIGH", help="Priorities that its jobs may have.")
    ] = "-100:0",
    hub: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN,...",
            help="Hub repositories that may be fetched with the operator's token, e.g. org/*.",
        ),
    ] = None,
    data: DataOption = None,
    url: OfService = None,
    json: JsonFlag = False,
) -> None:
    """Make a key and show it, once.

    Example: bitmill keys create alice --scopes read,submit --days 90
    """
    low, _, high = priorities.partition(":")
    asked = _request(
        {
            "name": name,
            "tenant": tenant,
            "scopes": [scope.strip() for scope in scopes.split(",")],
            "expires_in_s": None if days is None else days * _DAY,
            "limits": {
                "requests_per_minute": rate,
                "queued": queued,
                "running": running,
                "bytes": None if size is None else parse_size(size),
                "keep_days": keep_days,
                "keep_bytes": None if keep_bytes is None else parse_size(keep_bytes),
                "priorities": [_whole(low), _whole(high)],
                "hub_repositories": hub.split(",") if hub else [],
            },
        }
    )
    if url is not None:
        with open_client(url) as client:
            made, place = client.create_key(asked), client.url
            key, shown = made.key, made.model_dump(mode="json")
    else:
        from bitmill_service.api.views import key_view
        from bitmill_workers.store.keys import KeyStore

        with operators_database(data, make=True) as (settings, database):
            place = _place(settings)
            key, record = KeyStore(database).create(
                asked.name,
                scopes=asked.scopes,
                tenant=asked.tenant,
                expires_in=asked.expires_in_s,
                limits=asked.limits,
            )
        shown = key_view(record).model_dump(mode="json") | {"key": key}
    if json:
        print_json(shown)
        return
    typer.echo(key)
    typer.echo(
        f"This is shown once; it is for the service of {place}. Use it as BITMILL_API_KEY, or with "
        "`bitmill login`.",
        err=True,
    )


@keys.command("list")
def list_keys(*, data: DataOption = None, url: OfService = None, json: JsonFlag = False) -> None:
    """List all keys, revoked ones too, without their secrets.

    Example: bitmill keys list
    """
    if url is not None:
        with open_client(url) as client:
            found = client.keys()
    else:
        from bitmill_service.api.views import key_view

        with _store(data) as store:
            found = [key_view(record) for record in store.list()]
    if json:
        print_json([key.model_dump(mode="json") for key in found])
        return
    print_table(
        ("id", "name", "tenant", "scopes", "last used", "expires", "state"),
        [
            (
                *(key.id, key.name, key.tenant, ",".join(key.scopes)),
                *(format_time(key.last_used), format_time(key.expires_at), _state(key)),
            )
            for key in found
        ],
    )


@keys.command("revoke")
def revoke(
    key: KeyArgument, *, data: DataOption = None, url: OfService = None, json: JsonFlag = False
) -> None:
    """End a key: within seconds nobody can use it.

    Example: bitmill keys revoke 3fQ9aZ01
    """
    if url is not None:
        with open_client(url) as client:
            client.revoke_key(key)
    else:
        with _store(data) as store:
            try:
                store.revoke(key)
            except KeyNotFound as error:
                hint = "`bitmill keys list` shows them."
                raise InputError(
                    error.message, code=error.code, param="KEY_ID", hint=hint
                ) from error
    if json:
        print_json({"revoked": key})
    else:
        typer.echo(f"key {key} is revoked")


def login(
    *,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Try an API key and keep it for later commands, in a file that only you can read.

    The key is that of BITMILL_API_KEY, or asked for and not shown.

    Example: bitmill login --url https://bitmill.example
    """
    given = os.environ.get("BITMILL_API_KEY") or _asked()
    with Client(url, api_key=given.strip(), tries=2) as client:
        client.list_jobs(limit=1)
        place = keep_key(client.url, given.strip())
    if json:
        print_json({"url": client.url, "file": str(place)})
    else:
        typer.echo(f"the key for {client.url} is kept in {place}")


def logout(*, url: UrlOption = None, json: JsonFlag = False) -> None:
    """Forget the API key that `bitmill login` kept.

    Example: bitmill logout
    """
    with Client(url, api_key="") as client:
        keep_key(client.url, None)
    if json:
        print_json({"url": client.url})
    else:
        typer.echo(f"no key is kept for {client.url}")


def _asked() -> str:
    try:
        return str(typer.prompt("API key", hide_input=True, err=True))
    except typer.Abort as error:
        raise InputError("no API key was given: type one, or set BITMILL_API_KEY") from error


def _whole(number: str) -> int | str:
    """The number, or what stands in its place, which the request refuses."""
    try:
        return int(number)
    except ValueError:
        return number


def _request(given: dict[str, Any]) -> KeyRequest:
    try:
        return KeyRequest.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: {first['msg']}", code="invalid_request", param=where) from error


def _place(settings: ServiceSettings) -> str:
    """Which service the database is of."""
    return str(settings.data.absolute()) if settings.database_url is None else "the database"


def _state(key: KeyView) -> str:
    if key.revoked_at is not None:
        return f"revoked {format_time(key.revoked_at)}"
    return "expired" if key.expires_at and key.expires_at <= datetime.now(UTC) else "live"


@contextmanager
def _store(data: Any) -> Iterator[KeyStore]:
    """The keys of the operator's own database."""
    from bitmill_workers.store.keys import KeyStore

    with operators_database(data) as (_, database):
        yield KeyStore(database)
