"""Files sent by the kernel: ASGI's extension `http.response.zerocopysend` for uvicorn's HTTP/1.1.

    {"type": EXTENSION, "file": file, "offset": int, "count": int, "more_body": True}

The kernel copies from its page cache to the socket, so a download takes this process neither memory
nor, beside the copy, time. What is not in the page cache is read by a thread first: the event loop
must not wait for a disk. A client that takes nothing of a piece within `write_s` is let go; pieces
grow with the client's speed, so that the slowest that is served takes `_LEAST` bytes in that time.

Only without TLS, and where asyncio's own event loop runs on Linux (`available`).
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import BinaryIO, cast

import h11
from anyio import to_thread
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

EXTENSION = "http.response.zerocopysend"

_LEAST, _MOST = 256 << 10, 4 << 20
_STEP = 1 << 20
_SLOW_S, _FAST_S = 4.0, 1.0


def available(protocol: H11Protocol) -> bool:
    """Whether the connection's loop and transport can do it."""
    plain = protocol.transport.get_extra_info("sslcontext") is None
    return (
        sys.platform == "linux" and isinstance(protocol.loop, asyncio.SelectorEventLoop) and plain
    )


class ZeroCopy:
    """The application of one connection, with the extension. write_s: seconds."""

    def __init__(self, app: ASGIApp, protocol: H11Protocol, write_s: float) -> None:
        self._app, self._protocol, self._write_s = app, protocol, write_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == EXTENSION:
                await self._send_file(message["file"], message["offset"], message["count"])
            else:
                await send(message)

        if available(self._protocol):
            scope.setdefault("extensions", {})[EXTENSION] = {}
        await self._app(scope, receive, sending)

    async def _send_file(self, file: BinaryIO, offset: int, count: int) -> None:
        transport, loop = self._protocol.transport, self._protocol.loop
        if transport.is_closing():
            return
        # h11 counts the bytes and frames them by nothing: the answer has a Content-Length.
        data = h11.Data(data=cast(bytes, _Bytes(count)))
        self._protocol.conn.send_with_data_passthrough(data)
        end, piece = offset + count, _LEAST
        while offset < end and not transport.is_closing():
            size = min(piece, end - offset)
            if not _in_memory(file, offset, size):
                await to_thread.run_sync(os.pread, file.fileno(), size, offset)
            started = loop.time()
            try:
                async with asyncio.timeout(self._write_s):
                    sent = await loop.sendfile(transport, file, offset, size)
            except OSError:  # TimeoutError among them
                sent = 0
            if not sent:
                transport.abort()
                return
            offset += sent
            took = loop.time() - started
            if took < _FAST_S:
                piece = min(2 * piece, _MOST)
            elif took > _SLOW_S:
                piece = max(piece // 2, _LEAST)


class _Bytes:
    """Stands for so many bytes that are sent elsewhere."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count


def _in_memory(file: BinaryIO, offset: int, size: int) -> bool:
    """Whether a piece is in the page cache, by samples; False also where nobody can tell."""
    last = offset + size - 1
    try:
        return all(
            os.preadv(file.fileno(), [bytearray(1)], place, os.RWF_NOWAIT)
            for place in (*range(offset, last, _STEP), last)
        )
    except OSError:
        return False
