"""Texts as token windows, for calibration and for evaluation.

A text becomes consecutive windows of `length` tokens (`framing.py`). Calibration takes the first
`sequences` of a seeded permutation of the windows, held-out sequences are the next ones of it; of a
blend each text gives its share of both, in turn. Evaluation takes windows in their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.calibration.framing import framed
from bitmill.calibration.texts import bundled_names, bundled_text, read_text
from bitmill.config.quantization import (
    BundledText,
    Calibration,
    Evaluation,
    Framing,
)
from bitmill.errors import CalibrationError
from bitmill.models.tokenizer import shared_tokenizer


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Windows of one text, or of a blend.

    tokens: int64 [S, T]; held_out: int64 [S2, T], no window of `tokens`;
    digest: hex SHA-256 of both, part of what a profile is identified by; framing: how they begin.
    """

    tokens: Tensor
    held_out: Tensor
    digest: str
    framing: Framing = "tokenizer"


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
    text: str,
    tokenizer: Any,
    length: int,
    *,
    framing: Framing = "tokenizer",
    rows: int | None = None,
    param: str = "calibration.text",
) -> Tensor:
    """int64 [windows, length] of the whole text.

    param: field that the text is of. Raises `CalibrationError` where the text is shorter than one
    window or holds a token that the model's embedding of `rows` rows does not, and what `framed`
    raises.
    """
    windows = framed(text, tokenizer, length, framing)
    if not windows:
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        field = f"{param.partition('.')[0]}.length"
        raise CalibrationError(
            f"the text has {count} tokens, one sequence needs {length}: give a longer text or "
            f"a smaller {field}",
            code="text_too_short",
            param=field,
        )
    found = torch.tensor(windows, dtype=torch.int64)
    check_token_ids([int(found.max())], tokenizer, rows, param)
    return found


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
    tokenizer = shared_tokenizer(tokenizer_folder)
    others = calibration.held_out // 2 if calibration.held_out_text else 0
    source, asked = calibration.text, (calibration.length, calibration.framing, rows)
    names: tuple[str, ...] = ()
    if isinstance(source, BundledText):
        names = bundled_names(source.name)
        texts = [_bundled_windows(name, tokenizer, *asked, "calibration.text") for name in names]
    else:
        count = calibration.sequences + calibration.held_out
        text = read_text(source, count * calibration.length * 16)
        framing = calibration.framing
        texts = [token_windows(text, tokenizer, calibration.length, framing=framing, rows=rows)]

    def seeded(windows: Tensor, first: int, judge: int, param: str, count: str) -> Tensor:
        """In a seeded sequence, of first + judge at least. param, count: fields of text, number."""
        if len(windows) < first + judge:
            raise CalibrationError(
                f"a text of {param} has {len(windows)} sequences of {calibration.length} tokens, "
                f"{first} for calibration and {judge} held out are asked of it: give a longer "
                "text or lower these numbers",
                code="text_too_short",
                param=count,
            )
        return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]

    tokens, held_out = [], []
    firsts = _shares(calibration.sequences, len(texts))
    judges = _shares(calibration.held_out - others, len(texts))
    for windows, first, judge in zip(texts, firsts, judges, strict=True):
        found = seeded(windows, first, judge, "calibration.text", "calibration.sequences")
        tokens.append(found[:first])
        held_out.append(found[first : first + judge])
    if calibration.held_out_text and others:
        second, first, judge = calibration.held_out_text, 0, 0
        fields = "calibration.held_out_text", "calibration.held_out"
        if second in names:
            first, judge = firsts[names.index(second)], judges[names.index(second)]
        windows = _bundled_windows(second, tokenizer, *asked, fields[0])
        found = seeded(windows, first, judge + others, *fields)
        held_out.append(found[first + judge : first + judge + others])
    places = torch.cat([torch.arange(len(part)) for part in tokens])
    every, judging = torch.cat(tokens)[places.argsort(stable=True)], torch.cat(held_out)
    return CalibrationSet(every, judging, _digest(every, judging), calibration.framing)


def _shares(count: int, parts: int) -> list[int]:
    """Whole numbers as even as can be, the largest first, that add up to `count`."""
    return [(count + parts - 1 - i) // parts for i in range(parts)]


def evaluation_tokens(
    name: str,
    tokenizer_folder: Path,
    *,
    length: int,
    sequences: int | None = None,
    framing: Framing = "tokenizer",
    rows: int | None = None,
) -> Tensor:
    """int64 [windows, length] of a bundled text, in order, at most `sequences` of them.

    rows: of the model's input embedding. Raises `CalibrationError` as `token_windows` does.
    """
    tokenizer = shared_tokenizer(tokenizer_folder)
    found = _bundled_windows(name, tokenizer, length, framing, rows, "evaluation")
    return found[:sequences].clone()


def _bundled_windows(
    name: str, tokenizer: Any, length: int, framing: Framing, rows: int | None, param: str
) -> Tensor:
    """int64 [windows, length] of a whole bundled text, not to be changed."""
    found = _kept_windows(name, tokenizer, length, framing, param.partition(".")[0])
    check_token_ids([int(found.max())], tokenizer, rows, param)
    return found


@lru_cache(maxsize=4)
def _kept_windows(name: str, tokenizer: Any, length: int, framing: Framing, section: str) -> Tensor:
    """Kept, because several jobs of a process take the same texts. section: that asks for them."""
    return token_windows(bundled_text(name), tokenizer, length, framing=framing, param=section)


def evaluation_windows(
    asked: Evaluation, tokenizer_folder: Path, *, rows: int | None = None
) -> dict[str, Tensor]:
    """Windows int64 [S, T] of every text that an evaluation asks for; rows as above."""
    return {
        text: evaluation_tokens(
            text,
            tokenizer_folder,
            length=asked.length,
            sequences=asked.sequences,
            framing=asked.framing,
            rows=rows,
        )
        for text in asked.texts
    }
