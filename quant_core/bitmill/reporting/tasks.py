"""The report's table of lm-evaluation-harness tasks. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bitmill.results import QualityRow, TaskMetric


def task_table(rows: Sequence[QualityRow]) -> str:
    """HTML section with a column per task and metric, empty where no row has tasks."""
    measured = [row for row in rows if row.tasks]
    columns = list(
        dict.fromkeys(
            (task, metric)
            for row in measured
            for task, found in row.tasks.items()
            for metric in found.metrics
        )
    )
    if not columns:
        return ""
    head = "".join(f"<th scope=col>{escape(f'{task}, {metric}')}</th>" for task, metric in columns)
    body = "".join(_row(row, columns) for row in measured)
    samples = ", ".join(f"{task}: {found.samples}" for task, found in measured[0].tasks.items())
    return (
        "<h2>Tasks</h2><div class=scroll><table class=plain><caption>± is one standard error over "
        f"samples, as the harness gives it. Samples: {escape(samples)}.</caption>"
        f"<thead><tr><th scope=col>method</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(row: QualityRow, columns: Sequence[tuple[str, str]]) -> str:
    cells = []
    for task, metric in columns:
        found = row.tasks[task].metrics.get(metric) if task in row.tasks else None
        cells.append(f"<td>{_figure(found)}</td>")
    return f"<tr><td>{escape(row.method)}</td>{''.join(cells)}</tr>"


def _figure(metric: TaskMetric | None) -> str:
    if metric is None:
        return ""
    return f"{metric.value:.4f}" + ("" if metric.se is None else f" ± {metric.se:.4f}")
