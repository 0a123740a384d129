#!/usr/bin/env bash
# uvicorn 0.54.0 on CPython 3.11: a listening socket from `socket.create_server` costs each answer 40 ms.
#
# A program that wants a free port opens the socket itself and hands it to uvicorn. asyncio sets
# TCP_NODELAY only on sockets whose `proto` is IPPROTO_TCP; `socket.create_server` leaves it 0, and what
# it accepts has 0 too. uvicorn writes head and body of an answer apart, so on a kept connection
# the body waits for the client's delayed acknowledgement of the head. Seen on Linux: the same answers
# take 44 ms each, and 0.2 ms where the socket was made with IPPROTO_TCP. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install uvicorn==0.54.0 h11==0.16.0
"$work/venv/bin/python" - <<'PY'
import http.client
import platform
import socket
import statistics
import threading
import time

import uvicorn


async def app(scope, receive, send):
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


def milliseconds(listener: socket.socket) -> float:
    """Median of an answer on one kept connection."""
    settings = uvicorn.Config(app, lifespan="off", log_level="error", http="h11", loop="asyncio")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    client = http.client.HTTPConnection(*listener.getsockname())
    times = []
    for _ in range(60):
        started = time.perf_counter()
        client.request("GET", "/")
        client.getresponse().read()
        times.append(1000 * (time.perf_counter() - started))
    client.close()
    server.should_exit = True
    thread.join()
    return statistics.median(times)


usual = socket.create_server(("127.0.0.1", 0))
named = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
named.bind(("127.0.0.1", 0))
named.listen()
slow, fast = milliseconds(usual), milliseconds(named)
print(f"uvicorn {uvicorn.__version__}, Python {platform.python_version()}: an answer takes")
print(f"  {slow:.1f} ms on socket.create_server(...), {fast:.1f} ms on one with IPPROTO_TCP")
assert slow > 35 and fast < 20, "both are alike now"
PY
