"""The table of a quality report: what was measured, on how many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bitmill.quality import QualityRow, TextQuality
from bitmill_service.cli_output import format_size, print_table


def parse_rows(rows: Sequence[dict[str, Any]]) -> list[QualityRow]:
    """Rows of a report's JSON."""
    return [QualityRow.model_validate(row) for row in rows]


def print_report(rows: Sequence[QualityRow]) -> None:
    """One line per method and text; ± is one standard error over windows."""
    texts = {text for row in rows for text in row.texts}
    named = len(texts) > 1
    columns = ["method", "code bits", "true bits", "file size", "tokens", "perplexity", "KL"]
    if named:
        columns.insert(4, "text")
    lines = [
        _line(row, text if named else None, quality, first=index == 0)
        for row in rows
        for index, (text, quality) in enumerate(row.texts.items())
    ]
    print_table(columns, lines, numbers_from=1)


def _line(row: QualityRow, text: str | None, quality: TextQuality, *, first: bool) -> list[str]:
    source = row.code_bits is None
    head = [
        row.method,
        "-" if row.code_bits is None else f"{row.code_bits:.3f}",
        "-" if row.bits is None else f"{row.bits:.3f}",
        "-" if row.size is None else format_size(row.size),
    ]
    return [
        *(head if first else [""] * len(head)),
        *([] if text is None else [text.removesuffix("_evaluation")]),
        str(quality.tokens),
        f"{quality.perplexity:.2f} ± {quality.perplexity_se:.2f}",
        "0" if source else f"{quality.kl:.4f} ± {quality.kl_se:.4f}",
    ]
