"""Texts as token windows, for calibration and for evaluation.

A text is tokenized whole, without special tokens, and cut into consecutive windows of `length`
tokens; the remainder is dropped. Calibration takes the first `sequences` of a seeded permutation of
the windows, held-out sequences are the next ones of it; evaluation takes windows in their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.calibration.texts import bundled_text, read_text
from bitmill.config.quantization import (
    Calibration,
    Evaluation,
)
from bitmill.errors import CalibrationError
from bitmill.models.tokenizer import load_tokenizer


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Windows of one text.

    tokens: int64 [S, T]; held_out: int64 [S2, T], no window of `tokens`;
    digest: hex SHA-256 of both, part of what a profile is identified by.
    """

    tokens: Tensor
    held_out: Tensor
    digest: str


def check_token_ids(ids: Sequence[int], tokenizer: Any, rows: int | None, param: str) -> None:
    """Raise `CalibrationError` (code `token_beyond_embedding`) for an id that has no row.

    rows: those of the model's input embedding, None where they are not known.
    """
    largest = max(ids, default=0)
    if rows is None or largest < rows:
        return
    raise CalibrationError(
        f"token {tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, the model's "
        f"embedding has {rows} rows: use the tokenizer that the model was trained with, or leave "
        "the token out of the text",
        code="token_beyond_embedding",
        param=param,
    )


def token_windows(
    text: str, tokenizer: Any, length: int, *, rows: int | None = None, param: str = "text"
) -> Tensor:
    """int64 [windows, length]: the whole text without special tokens, remainder dropped.

    Raises `CalibrationError` where the text is shorter than one window or holds a token that the
    model's embedding of `rows` rows does not.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    check_token_ids(ids, tokenizer, rows, param)
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
    calibration: Calibration, tokenizer_folder: Path, *, seed: int = 0, rows: int | None = None
) -> CalibrationSet:
    """The calibration windows of a job and its held-out windows.

    rows: of the model's input embedding. Raises `CalibrationError` where the text cannot be read,
    has too few windows, or a token without a row.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    windows = token_windows(
        read_text(calibration), tokenizer, calibration.length, rows=rows, param="calibration.text"
    )
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
    name: str,
    tokenizer_folder: Path,
    *,
    length: int,
    sequences: int | None = None,
    rows: int | None = None,
) -> Tensor:
    """int64 [windows, length] of a bundled text, in order, at most `sequences` of them.

    rows: of the model's input embedding. Raises `CalibrationError` as `token_windows` does.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    text = bundled_text(name)
    return token_windows(text, tokenizer, length, rows=rows, param="evaluation")[:sequences]


def evaluation_windows(
    asked: Evaluation, tokenizer_folder: Path, *, rows: int | None = None
) -> dict[str, Tensor]:
    """Windows int64 [S, T] of every text that an evaluation asks for; rows as above."""
    return {
        text: evaluation_tokens(
            text, tokenizer_folder, length=asked.length, sequences=asked.sequences, rows=rows
        )
        for text in asked.texts
    }
