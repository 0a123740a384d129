"""The section on predicted and measured loss shows both numbers, and the diagonal between them."""

from __future__ import annotations

import re

from bitmill.reporting.html import predicted_against_measured
from bitmill.results import QualityRow, TextQuality


def row(method: str, predicted: float | None, **measured: float) -> QualityRow:
    texts = {
        text: TextQuality(
            windows=4,
            tokens=400,
            perplexity=20,
            perplexity_se=1,
            loss_increase=increase,
            loss_increase_se=0.0125,
        )
        for text, increase in measured.items()
    }
    return QualityRow(method=method, code_bits=3.0, predicted_loss=predicted, texts=texts)


ROWS = [
    row("source", None, wiki=0.0, handbook=0.0),
    row("ours", 0.2, wiki=0.25, handbook=0.1),
    row("equal", 0.05, wiki=0.05, handbook=0.05),
    row("lucky", 0.01, wiki=-0.002, handbook=0.02),
    row("other order", None, wiki=3.0, handbook=3.0),
]


def circles(html: str) -> list[tuple[float, float]]:
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', html)
    return [(float(x), float(y)) for x, y in found]


def test_rows_with_a_prediction_have_measurements_and_ratios() -> None:
    html = predicted_against_measured(ROWS)
    assert "<td>0.2</td><td>0.2500 ± 0.0125</td><td>1.25</td>" in html
    assert "<td>0.1000 ± 0.0125</td><td>0.50</td>" in html
    assert "<td>-0.0020 ± 0.0125</td><td>-0.20</td>" in html
    assert "source</td>" not in html
    assert "other order" not in html


def test_equal_losses_lie_on_the_diagonal_and_larger_ones_above() -> None:
    html = predicted_against_measured(ROWS)
    ends = re.search(r'<polyline points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', html)
    assert ends is not None
    left, bottom, right, top = map(float, ends.groups())
    slope = (top - bottom) / (right - left)
    above = [bottom + slope * (x - left) - y for x, y in circles(html)]
    assert len(above) == 5
    ours, equal, *handbook = above
    assert ours > 5
    assert abs(equal) < 0.2
    assert (handbook[0] < -5, abs(handbook[1]) < 0.2, handbook[2] > 5) == (True, True, True)


def test_without_predictions_or_rises_there_is_nothing_to_plot() -> None:
    assert predicted_against_measured([ROWS[0], ROWS[4]]) == ""
    falling = predicted_against_measured([row("lucky", 0.01, wiki=-0.1)])
    assert "<svg" not in falling
    assert "-0.1000" in falling
