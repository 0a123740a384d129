"""The tables of a quality report: what was measured, on how many tokens, and what was learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from bitmill.reporting.learning import learning_summary
from bitmill.results import (
    BlockQuality,
    QualityRow,
    TaskMetric,
    TextQuality,
    TuningQuality,
    with_error,
)
from bitmill_service.cli.output import format_size, print_table


def parse_rows(rows: Sequence[dict[str, Any]]) -> list[QualityRow]:
    """Rows of a report's JSON."""
    return [QualityRow.model_validate(row) for row in rows]


def print_quality(report: dict[str, Any]) -> None:
    """A whole report, as JSON values: rows, what was learned, warnings."""
    print_report(parse_rows(report["rows"]))
    begins = report.get("begins", {})
    for what in dict.fromkeys(begins.values()):
        kinds = " and ".join(kind for kind, found in begins.items() if found == what)
        typer.echo(f"windows of {kinds} begin with {what}")
    for check in report.get("checks", ()):
        measured = with_error(check["kl"], check["kl_se"], ".4f")
        typer.echo(
            f"{check['method']} map at {check['bits']:.3f} bits on held-out windows: predicted "
            f"{check['predicted_loss']:.4f}, measured {measured}"
            + (", taken" if check["taken"] else "")
        )
    for row in report["rows"]:
        if (gap := row.get("gap")) is not None:
            first, *_, last = row["texts"]
            typer.echo(f"{row['method']} loses {gap:.2f} times as much on {last} as on {first}")
    _print_learning(report)
    for warning in report.get("warnings", ()):
        typer.echo(f"warning: {warning}")


def print_report(rows: Sequence[QualityRow]) -> None:
    """One line per method and text, then per method and task; ± is one standard error."""
    texts = {text for row in rows for text in row.texts}
    named = len(texts) > 1
    columns = ["method", "code bits", "bits", "file size", "tokens", "perplexity", "KL"]
    if named:
        columns.insert(4, "text")
    lines = [
        _line(row, text if named else None, quality, first=index == 0)
        for row in rows
        for index, (text, quality) in enumerate(row.texts.items())
    ]
    print_table(columns, lines, numbers_from=1)
    for row in rows:
        for task, found in row.tasks.items():
            metrics = ", ".join(f"{name} {_metric(m)}" for name, m in found.metrics.items())
            typer.echo(f"{row.method}, {task}: {metrics}")


def _metric(metric: TaskMetric) -> str:
    error = "" if metric.se is None else f" ± {metric.se:.4f}"
    return f"{metric.value:.4f}{error}"


def _print_learning(report: dict[str, Any]) -> None:
    """A line per learned block, and what learning changed; nothing where nothing learned."""
    blocks = [BlockQuality.model_validate(block) for block in report.get("blocks", ())]
    if not blocks:
        return
    texts = list(dict.fromkeys(name for block in blocks for name in block.texts))
    columns = ["block", "kept", "error before", "after", "change"]
    columns += [name.removesuffix("_evaluation") for name in texts]
    print_table(
        [*columns, "best of steps", "seconds"],
        [_block_line(block, texts) for block in blocks],
        numbers_from=2,
    )
    tuning = report.get("tuning")
    parsed = None if tuning is None else TuningQuality.model_validate(tuning)
    for line in learning_summary(blocks, parsed, resumed=report.get("resumed", False)):
        typer.echo(line)


def _block_line(block: BlockQuality, texts: Sequence[str]) -> list[str]:
    pairs = [(block.loss_before, block.loss_after), *(block.texts[name] for name in texts)]
    return [
        str(block.index),
        block.kept,
        f"{block.loss_before:.4g}",
        f"{block.loss_after:.4g}",
        *(f"{after / before - 1:+.1%}" if before > 0 else "-" for before, after in pairs),
        f"{block.best_step} of {block.steps}",
        f"{block.seconds:.1f}",
    ]


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
        with_error(quality.perplexity, quality.perplexity_se, ".2f"),
        "0" if source else with_error(quality.kl, quality.kl_se, ".4f"),
    ]
