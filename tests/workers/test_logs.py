"""Structured log lines."""

from __future__ import annotations

import json
import logging

from bitmill_workers.logs import JsonLines, log_fields


def line(message: str) -> dict[str, object]:
    record = logging.LogRecord("bitmill.x", logging.WARNING, "f", 1, message, None, None)
    found = json.loads(JsonLines().format(record))
    assert isinstance(found, dict)
    return found


def test_line_carries_the_ids_of_its_context() -> None:
    with log_fields(request_id="r"), log_fields(job_id="j", attempt=2):
        entry = line("hello")
    assert (entry["message"], entry["level"]) == ("hello", "warning")
    assert (entry["request_id"], entry["job_id"], entry["attempt"]) == ("r", "j", 2)
    assert "job_id" not in line("later")


def test_secrets_are_struck_out() -> None:
    text = (
        "hf_abcdefghijk bm_0123456789 postgresql://u:pass@db/x "
        "https://s3/x?X-Amz-Signature=abcdef&y=1"
    )
    shown = str(line(text)["message"])
    for secret in ("hf_abc", "bm_012", "pass", "abcdef"):
        assert secret not in shown
    assert "@db/x" in shown
    assert "&y=1" in shown
