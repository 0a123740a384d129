"""What the library said of models lately, so that the next job of a kind is not planned anew.

A plan depends on the configuration and on the folder's files alone. Files are known by name, size,
inode and times of change; a folder in which something changed within the last `settled_s` seconds
is read each time, because a file system's clock may not tell two changes in a row apart.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from pathlib import Path

from bitmill.config.quantization import QuantizationConfig
from bitmill.io.atomic import sha256_json
from bitmill.pipeline import admission as library
from bitmill.pipeline.estimate import Estimate, Machine

_KEPT = 16
"""A plan of a large mixture of experts is some tens of megabytes."""

Planned = tuple[library.Admission, Estimate]
"""What was admitted, and what it needs on an accelerator."""


class Plans:
    """The latest plans of this process."""

    def __init__(self, *, settled_s: float = 2.0) -> None:
        self._settled_ns = int(settled_s * 1e9)
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Planned] = OrderedDict()

    def admit(self, folder: Path, config: QuantizationConfig, gguf: str | None) -> Planned:
        """As `bitmill.pipeline.admission.admit`; what is refused is looked at again each time."""
        files = self._identity(folder)
        if files is None:
            return _plan(folder, config, gguf)
        key = sha256_json([str(folder), files, gguf, config.model_dump(mode="json")])
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        found = _plan(folder, config, gguf)
        if self._identity(folder) == files:
            with self._lock:
                self._known[key] = found
                while len(self._known) > _KEPT:
                    self._known.popitem(last=False)
        return found

    def _identity(self, folder: Path) -> list[tuple[str, int, int, int, int]] | None:
        """What tells this folder's files from any others; None where they have changed just now."""
        found, newest = [], 0
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    stat = entry.stat()
                    times = stat.st_mtime_ns, stat.st_ctime_ns
                    found.append((entry.name, stat.st_size, stat.st_ino, *times))
                    newest = max(newest, *times)
        except OSError:  # the library says what is wrong with it
            return None
        return sorted(found) if newest <= time.time_ns() - self._settled_ns else None


def _plan(folder: Path, config: QuantizationConfig, gguf: str | None) -> Planned:
    admitted = library.admit(folder, config, gguf=gguf)
    return admitted, admitted.needs(Machine(accelerator=True))
