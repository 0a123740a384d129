"""The report's section on trust: the loss that the profile predicts against what was measured.

Both are increases of the mean negative log-likelihood over the source model, nats per token. The
profile adds up second-order costs of single groups on the calibration text; the measurement is of
the whole model on an evaluation text. Points near the diagonal mean that other budgets may be
chosen by the predicted curve; points far above it that the costs no longer add up. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bitmill.reporting.charts import Series, line_chart
from bitmill.results import QualityRow

TEXT_COLOURS = ("#d95f02", "#7570b3", "#1b9e77")
"""Colours of the texts, in order, told apart by colour-blind eyes."""


def predicted_against_measured(rows: Sequence[QualityRow]) -> str:
    """HTML section with a table and a plot, empty where no row has a prediction."""
    known = [row for row in rows if row.predicted_loss is not None and row.texts]
    if not known:
        return ""
    texts = list(dict.fromkeys(text for row in known for text in row.texts))
    head = "".join(
        f"<th scope=col>{escape(text)}</th><th scope=col>measured / predicted</th>"
        for text in texts
    )
    body = "".join(_row(row, texts) for row in known)
    return (
        "<h2>Predicted against measured loss</h2><p>Increase of the loss over the source model, "
        "nats/token. The profile predicts it from the calibration text for these widths in the "
        "profile's column order; the other columns are measured. Where both agree, the size-loss "
        "curve can be trusted at that size.</p>"
        "<div class=scroll><table class=plain><caption>± is one standard error of the paired "
        "difference over windows.</caption><thead><tr><th scope=col>method</th>"
        f"<th scope=col>code bits</th><th scope=col>predicted</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>{_plot(known, texts)}"
    )


def _row(row: QualityRow, texts: Sequence[str]) -> str:
    predicted = row.predicted_loss or 0.0
    cells = ["" if row.code_bits is None else f"{row.code_bits:.3f}", f"{predicted:.4g}"]
    for text in texts:
        found = row.texts.get(text)
        if found is None:
            cells += ["", ""]
            continue
        cells.append(f"{found.loss_increase:.4f} ± {found.loss_increase_se:.4f}")
        cells.append(f"{found.loss_increase / predicted:.2f}" if predicted > 0 else "")
    body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr><td>{escape(row.method)}</td>{body}</tr>"


def _plot(rows: Sequence[QualityRow], texts: Sequence[str]) -> str:
    """Logarithmic on both axes, with the diagonal; rows without a positive loss are left out."""
    series, key = [], []
    for place, text in enumerate(texts):
        colour = TEXT_COLOURS[place % len(TEXT_COLOURS)]
        found = [
            (row.method, row.predicted_loss, row.texts[text].loss_increase)
            for row in rows
            if row.predicted_loss and text in row.texts and row.texts[text].loss_increase > 0
        ]
        points = tuple((predicted, measured) for _, predicted, measured in found)
        labels = tuple(method if place == 0 else "" for method, _, _ in found)
        series.append(Series(text, points, colour, labels=labels))
        key.append(f'<span style="background:{colour};color:#fff">{escape(text)}</span>')
    values = [value for one in series for point in one.points for value in point]
    if not values:
        return ""
    diagonal = tuple((end, end) for end in (min(values), max(values)))
    chart = line_chart(
        [Series("equal", diagonal, "var(--soft)", line=True), *series],
        x_title="predicted increase of loss, nats/token",
        y_title="measured, nats/token",
        log_x=True,
    )
    return f"<div class=key>{''.join(key)}</div>{chart}"
