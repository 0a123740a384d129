"""Real HTTP for tests: an ASGI app on uvicorn, loopback, a port that the system chooses."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def serve(app: Callable[..., Any], **options: Any) -> Iterator[str]:
    """Serve `app` in a thread until the block ends; yields its URL. options: of uvicorn."""
    listener = socket.create_server(("127.0.0.1", 0))
    usual: dict[str, Any] = {"log_level": "critical", "timeout_graceful_shutdown": 2}
    config = uvicorn.Config(app, **usual | options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server did not stop"
