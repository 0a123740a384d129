"""What a child says, on its way to the job's events, row and log: batched and coalesced.

Of several progress messages of one stage between two writes only the last is kept, so a job makes
at most one progress event per write whatever its runner says.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from bitmill.errors import BitmillError
from bitmill_workers.execution.eta import Eta
from bitmill_workers.store.leases import LeaseStore
from bitmill_workers.store.records import JobRecord

_MAX_PENDING = 1000


class Reporter:
    """Collects a child's messages and log; `flush` writes them under the attempt's token.

    After the child has ended, `result` or `error` holds its last word, if it had one.
    """

    def __init__(self, leases: LeaseStore, job: JobRecord, eta: Eta, *, log_limit: int) -> None:
        self._leases = leases
        self._eta = eta
        self._key = (job.id, job.token)
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._log = bytearray()
        self._log_limit = log_limit
        self._mid_line = False
        self._shown: dict[str, Any] = {}
        self.begin()

    def begin(self) -> None:
        """Forget the last word of an earlier child."""
        self.result: dict[str, Any] = {}
        self.error: BitmillError | None = None

    def message(self, message: dict[str, Any]) -> None:
        """Take one message: {"type": "result" | "error" | "progress", ...}."""
        match message.get("type", "progress"):
            case "result":
                self.result = message
            case "error":
                told = message.get("error")
                self.error = BitmillError.from_dict(told if isinstance(told, dict) else {})
            case _:
                self._progress({k: v for k, v in message.items() if k != "type"})

    def _progress(self, data: dict[str, Any]) -> None:
        kind = str(data.pop("kind", "progress"))
        stage = data.get("stage")
        if kind == "progress":
            self._shown["progress"] = data
            left = self._eta.remaining(str(stage), data.get("done") or 0, data.get("total") or 0)
            if left is not None:
                self._shown["remaining_s"] = left.seconds
                margin = [left.least - left.seconds, left.most - left.seconds]
                self._shown["progress"] = {**data, "margin_s": margin}
            last = self._events[-1] if self._events else None
            if last and last[0] == "progress" and last[1].get("stage") == stage:
                self._events.pop()
        elif kind in ("stage", "warning"):
            self._note(kind, data)
        if stage is not None:
            self._shown["stage"] = stage
        if len(self._events) < _MAX_PENDING:
            self._events.append((kind, data))

    def log(self, data: bytes) -> None:
        """Take a piece of the child's output; what exceeds the log's limit is dropped."""
        self._mid_line = not data.endswith(b"\n")
        self._log += data[: max(0, self._log_limit - len(self._log))]

    def _note(self, kind: str, data: dict[str, Any]) -> None:
        """A line of the log, which would otherwise say nothing of a job that met no trouble."""
        told = [data.get("stage"), kind if kind == "warning" else data.get("state")]
        text = " ".join(str(word) for word in told if word)
        if message := data.get("message"):
            text += f": {message}"
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        self.log(b"\n" * self._mid_line + f"{now} {text}\n".encode())

    def flush(self) -> bool:
        """Write what was collected; False where the attempt is fenced. Keeps it on an error."""
        if self._events or self._shown:
            if not self._leases.report(*self._key, self._events, **self._shown):
                return False
            self._events, self._shown = [], {}
        if self._log:
            if not self._leases.append_log(*self._key, bytes(self._log), limit=self._log_limit):
                return False
            self._log = bytearray()
        return True
