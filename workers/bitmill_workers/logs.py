"""Log lines of all processes: one JSON object each, on standard error.

`log_fields` adds ids (request, job, attempt, worker) to every line that is written inside it, also
by libraries. What looks like a token or a password is struck out.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from bitmill.errors import BitmillError
from bitmill_workers.settings import Settings

ACCESS = "bitmill.access"
"""Logger of one line for each request; silent unless a logging configuration asks for it."""
AUDIT = "bitmill.audit"
"""Logger of one line for each change: who did it (key, address), what it was, what it answered."""
_CHATTY = ("alembic", "boto3", "botocore", "celery", "huggingface_hub", "kombu", "s3transfer")
_FIELDS: ContextVar[dict[str, object]] = ContextVar("log_fields", default={})  # noqa: B039
_SECRETS = re.compile(
    r"hf_\w{8,}|bm_\w{8,}|X-Amz-(?:Signature|Credential)=[^&\s\"]+|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)


@contextmanager
def log_fields(**fields: object) -> Iterator[None]:
    """Add these fields to every log line written inside the block, by this thread or task."""
    token = _FIELDS.set(_FIELDS.get() | fields)
    try:
        yield
    finally:
        _FIELDS.reset(token)


def run_logged(main: Callable[[], int]) -> int:
    """The exit code of a program; an error that ends it is a line of the log, and 1."""
    try:
        return main()
    except BitmillError as error:
        told = (error.message.rstrip("."), error.hint) if error.hint else (error.message,)
        logging.getLogger(__name__).error("%s", ". ".join(told))
        return 1


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the fields, the exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, object] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": strike_secrets(record.getMessage()),
            **_FIELDS.get(),
        }
        if record.exc_info:
            entry["exception"] = strike_secrets(self.formatException(record.exc_info))
        return json.dumps(entry, default=str)


def strike_secrets(text: str) -> str:
    """The text with tokens, signatures and URL passwords replaced."""
    return _SECRETS.sub("[secret]", text)


def configure_logs(settings: Settings) -> None:
    """Send all log records to standard error as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level)
    for name in (*_CHATTY, ACCESS):
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))
    logging.getLogger(AUDIT).setLevel(logging.INFO)
