"""Texts for calibration and evaluation: bundled ones, files, data sets of the Hub.

A file's form is told by its name: `.jsonl` and `.ndjson` hold a JSON object a line, `.json` an
array of objects or of strings, anything else is text. Text that is JSON all the same is refused,
since its braces would be measured too. A byte order mark at the start is no text.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from bitmill.config.quantization import DatasetText, FileText
from bitmill.errors import CalibrationError, raise_resource_error, reason

BLENDED = ("wiki_calibration", "mixture_calibration")
MAX_TEXT_BYTES = 512 << 20
_LINES = {".jsonl", ".ndjson"}


def bundled_text(name: str) -> str:
    """A text that ships with the library, e.g. "wiki_evaluation"."""
    return (resources.files("bitmill") / "texts" / f"{name}.txt").read_text("utf-8")


def bundled_names(name: str) -> tuple[str, ...]:
    """The texts of a blend, or the one text of this name."""
    return BLENDED if name == "blend_calibration" else (name,)


def _json_lines(name: str, text: str, field: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):  # JSON's strings may hold other separators
        if line.strip():
            yield _record(_parsed(line, f"{name}, line {number}", field), field, name, number)


def _json_array(name: str, text: str, field: str) -> Iterator[str]:
    records = _parsed(text, name, field)
    if not isinstance(records, list):
        raise _bad_field(
            f"{name} holds no JSON array: give an array of objects with the field {field!r}, or "
            "one object a line in a .jsonl file"
        )
    for number, record in enumerate(records, 1):
        found = {field: record} if isinstance(record, str) else record
        yield _record(found, field, name, number)


def _parsed(text: str, where: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad_field(f"{where}: no JSON with the field {field!r}") from error


def _record(record: Any, field: str, name: str, number: int) -> str:
    if not isinstance(record, dict) or field not in record:
        raise _bad_field(
            f"{name}, line or record {number}: no JSON object with the field {field!r}"
        )
    text = record[field]
    if not isinstance(text, str):
        raise _bad_field(
            f"{name}, line or record {number}: field {field!r} is a {type(text).__name__}, "
            "not a string"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _bad_field(
            f"{name}, line or record {number}: field {field!r} holds half of a surrogate pair, "
            "which is no character"
        ) from error
    return text


def _bad_field(message: str) -> CalibrationError:
    return CalibrationError(message, param="calibration.text.field")


def _refuse_json(name: str, text: str) -> None:
    """Text that is JSON as a whole, or whose first line is an object, was named wrongly."""
    start = text.lstrip()
    first, _, rest = start.partition("\n")
    for part, suffix in ((start, ".json"), (first, ".jsonl")):
        if part[:1] not in ("[", "{") or (suffix == ".jsonl" and not rest):
            continue
        with suppress(ValueError, RecursionError):
            json.loads(part)
            raise CalibrationError(
                f"{name} holds JSON: give it a name that ends in {suffix}, and name the texts' "
                "field",
                code="text_is_json",
                param="calibration.text.path",
            )


def check_text_file(source: FileText) -> None:
    """Raise `CalibrationError` where there is no such file, before anything is done for it."""
    path = Path(source.path)
    if not path.is_file():
        problem = "is no file" if path.exists() else "is not there"
        raise CalibrationError(
            f"calibration text {path.name} {problem}: give a text or .jsonl file",
            param="calibration.text.path",
        )


def _file_text(source: FileText) -> str:
    path = Path(source.path)
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise CalibrationError(
                f"{path.name} has {size} bytes, the limit is {MAX_TEXT_BYTES}; give a part of it",
                param="calibration.text.path",
            )
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"calibration text {path.name} cannot be read as UTF-8: {reason(error)}",
            param="calibration.text.path",
        ) from error
    suffix = path.suffix.lower()
    if suffix in _LINES:
        return "\n\n".join(_json_lines(path.name, text, source.field))
    if suffix == ".json":
        return "\n\n".join(_json_array(path.name, text, source.field))
    _refuse_json(path.name, text)
    return text


def _dataset_text(source: DatasetText, enough: int) -> str:
    """Rows of a Hub data set, joined by empty lines, until there are `enough` characters."""
    if importlib.util.find_spec("datasets") is None:
        raise CalibrationError(
            f"calibration data set {source.name!r} needs the `datasets` package: "
            "run `pip install datasets`, or give a text file",
            code="datasets_missing",
            param="calibration.text",
        )
    import datasets

    try:
        rows = datasets.load_dataset(source.name, source.config, split=source.split, streaming=True)
        parts: list[str] = []
        total = 0
        for row in rows:
            parts.append(str(row[source.field]))
            total += len(parts[-1]) + 2
            if total >= enough:
                break
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise_resource_error(error)
        raise CalibrationError(
            f"calibration data set {source.name!r}, split {source.split!r}, field "
            f"{source.field!r} cannot be read: {str(error)[:300]}",
            code="dataset_unreadable",
            param="calibration.text",
        ) from error
    return "\n\n".join(parts)


def read_text(source: FileText | DatasetText, enough: int) -> str:
    """A file's text, or `enough` characters of a data set; raises `CalibrationError` where it
    cannot be read."""
    if isinstance(source, FileText):
        return _file_text(source)
    return _dataset_text(source, enough)
