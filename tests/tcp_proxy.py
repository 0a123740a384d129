"""A loopback TCP proxy whose connections can be frozen (half open), cut or refused."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

_CHUNK = 1 << 16


class TcpProxy:
    """Forwards a port of its own to `target`; starts at once.

    `freeze` swallows what either side sends while connections look alive; `thaw` cuts the frozen
    connections, as a router that forgot them would, and forwards new ones again.
    """

    def __init__(self, target: int, port: int = 0) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        self._flowing = threading.Event()
        self._flowing.set()
        self._links: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def links(self) -> int:
        """Sockets of connections that were made and not cut."""
        with self._lock:
            return len(self._links)

    def freeze(self) -> None:
        """Deliver nothing from now on; connecting still works."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Cut all connections and forward new ones."""
        self.cut()
        self._flowing.set()

    def cut(self) -> None:
        """End every connection."""
        with self._lock:
            links, self._links = self._links, set()
        for link in links:
            _close(link)

    def close(self) -> None:
        """Stop listening and end every connection."""
        _close(self._listener)
        self.thaw()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._link, args=(near,), daemon=True).start()

    def _link(self, near: socket.socket) -> None:
        with self._lock:
            self._links.add(near)
        if not self._flowing.is_set():
            self._flowing.wait()
            _close(near)
            return
        try:
            far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
        except OSError:
            _close(near)
            return
        far.settimeout(None)
        with self._lock:
            self._links.add(far)
        threading.Thread(target=self._pump, args=(far, near), daemon=True).start()
        self._pump(near, far)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(_CHUNK):
                if self._flowing.is_set():
                    sink.sendall(data)
        _close(source)
        _close(sink)


def _close(link: socket.socket) -> None:
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)
    link.close()
