"""Texts as token windows, for calibration and for evaluation.

A text is tokenized whole, without special tokens, and cut into consecutive windows of `length`
tokens; the remainder is dropped. Calibration takes the first `sequences` of a seeded permutation of
the windows, held-out sequences are the next ones of it; evaluation takes windows in their order.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.config.quantization import (
    BundledText,
    Calibration,
    DatasetText,
    Evaluation,
    FileText,
)
from bitmill.errors import CalibrationError, raise_resource_error, reason
from bitmill.models.tokenizer import load_tokenizer

MAX_TEXT_BYTES = 512 << 20


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Windows of one text.

    tokens: int64 [S, T]; held_out: int64 [S2, T], no window of `tokens`;
    digest: hex SHA-256 of both, part of what a profile is identified by.
    """

    tokens: Tensor
    held_out: Tensor
    digest: str


def bundled_text(name: str) -> str:
    """A text that ships with the library, e.g. "wiki_evaluation"."""
    return (resources.files("bitmill") / "texts" / f"{name}.txt").read_text("utf-8")


def _json_lines(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CalibrationError(
                    f"{path.name}, line {number}: no JSON object with the field {field!r}",
                    param="calibration.text.field",
                ) from error
            if not isinstance(text, str):
                raise CalibrationError(
                    f"{path.name}, line {number}: field {field!r} is a {type(text).__name__}, "
                    "not a string",
                    param="calibration.text.field",
                )
            yield text


def _file_text(source: FileText) -> str:
    path = Path(source.path)
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise CalibrationError(
                f"{path.name} has {size} bytes, the limit is {MAX_TEXT_BYTES}; give a part of it",
                param="calibration.text.path",
            )
        if path.suffix == ".jsonl":
            return "\n\n".join(_json_lines(path, source.field))
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"calibration text {path.name} cannot be read as UTF-8: {reason(error)}",
            param="calibration.text.path",
        ) from error


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


def read_text(calibration: Calibration) -> str:
    """The calibration text; raises `CalibrationError` where it cannot be read."""
    match calibration.text:
        case BundledText(name=name):
            return bundled_text(name)
        case FileText() as file:
            return _file_text(file)
        case DatasetText() as dataset:
            windows = calibration.sequences + calibration.held_out
            return _dataset_text(dataset, enough=windows * calibration.length * 16)


def token_windows(text: str, tokenizer: Any, length: int) -> Tensor:
    """int64 [windows, length]: the whole text without special tokens, remainder dropped.

    Raises `CalibrationError` where the text is shorter than one window.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = len(ids) // length
    if windows == 0:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, one sequence needs {length}: give a longer text or "
            "a smaller calibration.length",
            code="text_too_short",
            param="calibration.length",
        )
    return torch.tensor(ids[: windows * length], dtype=torch.int64).view(windows, length)


def _digest(*parts: Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(tuple(part.shape)).encode())
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


def calibration_tokens(
    calibration: Calibration, tokenizer_folder: Path, *, seed: int = 0
) -> CalibrationSet:
    """The calibration windows of a job and its held-out windows.

    Raises `CalibrationError` where the text cannot be read or has too few windows.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    windows = token_windows(read_text(calibration), tokenizer, calibration.length)
    first, asked = calibration.sequences, calibration.sequences + calibration.held_out
    if len(windows) < asked:
        raise CalibrationError(
            f"the text has {len(windows)} sequences of {calibration.length} tokens, "
            f"{calibration.sequences} for calibration and {calibration.held_out} held out are "
            "asked for: give a longer text or lower these numbers",
            code="text_too_short",
            param="calibration.sequences",
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    tokens, held_out = windows[order[:first]], windows[order[first:asked]]
    return CalibrationSet(tokens, held_out, _digest(tokens, held_out))


def evaluation_tokens(
    name: str, tokenizer_folder: Path, *, length: int, sequences: int | None = None
) -> Tensor:
    """int64 [windows, length] of a bundled text, in order, at most `sequences` of them."""
    tokenizer = load_tokenizer(tokenizer_folder)
    return token_windows(bundled_text(name), tokenizer, length)[:sequences]


def evaluation_windows(asked: Evaluation, tokenizer_folder: Path) -> dict[str, Tensor]:
    """Windows int64 [S, T] of every text that an evaluation asks for."""
    return {
        text: evaluation_tokens(
            text, tokenizer_folder, length=asked.length, sequences=asked.sequences
        )
        for text in asked.texts
    }
