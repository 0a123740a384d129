"""The HTTP application: `create_app(settings)`.

The app owns connections to the job store and the broker, and a reconciler of which one replica at
a time is active; it starts no worker, so any number of replicas can serve the same database.
`bitmill serve` (`embedded/server.py`) puts a worker beside it.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from wsgiref.simple_server import WSGIServer

from fastapi import Depends, FastAPI
from prometheus_client import start_http_server
from starlette.concurrency import run_in_threadpool

from bitmill_service.api.context import Context
from bitmill_service.api.routes import (
    exports,
    health,
    hub,
    job_outputs,
    jobs,
    keys,
    maps,
    profiles,
    pushes,
    sweeps,
    uploads,
    workers,
)
from bitmill_service.http import problems
from bitmill_service.http.access import PAGES, Access, KeyRing
from bitmill_service.http.connections import STOPPING
from bitmill_service.http.fair_use import FairUse, RateLimiter
from bitmill_service.http.media_type import require_json
from bitmill_service.http.metrics import new_registry
from bitmill_service.http.middleware import BodyLimit, RequestContext
from bitmill_service.http.openapi import describe, refusals
from bitmill_service.http.query import refuse_unknown_query
from bitmill_service.http.same_origin import SameOrigin
from bitmill_service.pages.app import entry, pages_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.messaging.app import Dispatcher
from bitmill_workers.messaging.reconcile import Reconciler
from bitmill_workers.storage.open import open_artifacts
from bitmill_workers.store.catalog import Catalog
from bitmill_workers.store.db import Database
from bitmill_workers.store.jobs import JobStore
from bitmill_workers.store.keys import KeyStore
from bitmill_workers.store.migrate import require_head
from bitmill_workers.store.sweeps import SweepStore
from bitmill_workers.store.uploads import UploadStore

_DESCRIPTION = """Turns a language model into a mixed-precision checkpoint of exactly the size \
asked for: submit a job, follow its events, download the bit-width map and the packed checkpoint.

Errors are `application/problem+json` (RFC 9457) with a stable `code`, the `param` at fault and a \
`hint` what to do."""


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Refuse a database of another version; send wake-ups and reconcile while the app runs.

    Gives the server what `GuardedProtocol` sets when it stops.
    """
    context: Context = app.state.context
    await run_in_threadpool(require_head, context.database)
    dispatcher = Dispatcher(context.settings, context.jobs.mark_sent)
    context.notify = dispatcher.notify
    reconciler = Reconciler(context.settings, context.database, dispatcher)
    reconciler.start()
    metrics = _serve_metrics(context)
    # What was imported stays: looking through it again and again while a request makes many objects
    # takes longer than the request.
    gc.collect()
    gc.freeze()
    yield {STOPPING: context.stopping}
    gc.unfreeze()
    if metrics is not None:
        await run_in_threadpool(metrics.shutdown)
        metrics.server_close()
    context.stopping.set()
    context.artifacts.stop()
    await run_in_threadpool(reconciler.stop)
    await run_in_threadpool(dispatcher.close)
    context.database.close()


def _serve_metrics(context: Context) -> WSGIServer | None:
    """Metrics at a port of their own, for a network that only the operator's programs reach."""
    port = context.settings.metrics_port
    if port is None:
        return None
    server, _ = start_http_server(port, context.settings.metrics_host, context.registry)
    return server


def make_context(settings: ServiceSettings) -> Context:
    """Connect the stores; creates the data folder, does not touch the schema."""
    settings.data.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database)
    store, catalog = JobStore(database), Catalog(database)
    return Context(
        settings=settings,
        database=database,
        jobs=store,
        catalog=catalog,
        artifacts=open_artifacts(settings, for_clients=True),
        uploads=UploadStore(database),
        sweeps=SweepStore(database),
        keys=KeyRing(KeyStore(database), settings),
        registry=new_registry(store, catalog, settings),
    )


def create_app(settings: ServiceSettings | None = None) -> FastAPI:
    """The application for these settings; from the environment where none are given.

    Starting it raises `StoreUnavailable` where the database is not of this version.
    """
    context = make_context(settings or ServiceSettings())
    app = FastAPI(
        title="Bitmill",
        version=health.VERSION,
        description=_DESCRIPTION,
        lifespan=_lifespan,
        responses=refusals(),
        separate_input_output_schemas=False,
        docs_url=None,
        redoc_url=None,
    )
    describe(app)
    app.state.context = context
    problems.install(app)
    app.add_middleware(BodyLimit, limit=context.settings.max_body)
    app.add_middleware(FairUse, limiter=RateLimiter(context.settings.calls_per_minute))
    app.add_middleware(Access, ring=context.keys)
    app.add_middleware(SameOrigin, hosts=context.settings.allowed_hosts)
    app.add_middleware(RequestContext, registry=context.registry)
    for router in (
        jobs.router,
        exports.router,
        pushes.router,
        sweeps.router,
        job_outputs.streams,
        job_outputs.router,
        profiles.router,
        maps.router,
        uploads.router,
        keys.router,
        workers.router,
    ):
        app.include_router(
            router, dependencies=[Depends(refuse_unknown_query), Depends(require_json)]
        )
    app.include_router(health.router)
    app.include_router(entry)
    app.mount(PAGES, pages_app(context))
    app.include_router(hub.router)
    return app
