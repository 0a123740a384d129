"""What a sweep found: one table as CSV, Markdown or JSON, and size against perplexity as SVG.

A line per cell in the order of the grid, whatever came of it. Torch-free.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from bitmill.reporting.charts import Series, svg_chart
from bitmill.results import QualityRow

_COLOURS = ("#d95f02", "#7570b3", "#1b9e77", "#e7298a", "#66a61e", "#a6761d", "#1f78b4", "#666666")
_MB = 1e6


@dataclass(frozen=True)
class SweepRow:
    """One cell. axes: path of a field -> value as text. job: its id or folder.

    quality: of the packed checkpoint, None unless it succeeded. seconds: from its start to its end.
    alone_s: wall time of all of its stages, those too that another cell made. error: why it failed.
    """

    cell: int
    axes: Mapping[str, str]
    state: str
    job: str | None = None
    quality: QualityRow | None = None
    seconds: float | None = None
    alone_s: float | None = None
    error: str | None = None

    @property
    def columns(self) -> dict[str, str | int | float | None]:
        """Every value by its column; a column's name says the unit where it is not plain."""
        found: dict[str, str | int | float | None] = {"cell": self.cell, **self.axes}
        found["state"] = self.state
        if (quality := self.quality) is not None:
            for name in ("bits", "code_bits", "size", "predicted_loss"):
                found[name] = getattr(quality, name)
            for text, measured in quality.texts.items():
                found[f"perplexity {text}"] = measured.perplexity
                found[f"KL {text}"] = measured.kl
            for task, scored in quality.tasks.items():
                found |= {f"{task} {name}": m.value for name, m in scored.metrics.items()}
        found |= {"seconds": self.seconds, "alone_s": self.alone_s}
        return found | {"job": self.job, "error": self.error}


@dataclass(frozen=True)
class SweepTable:
    """The cells of a sweep in the order of its grid."""

    rows: Sequence[SweepRow]

    @cached_property
    def _columns(self) -> list[dict[str, str | int | float | None]]:
        return [row.columns for row in self.rows]

    @cached_property
    def head(self) -> list[str]:
        """Names of all columns that any cell has a value for."""
        first = max(self._columns, key=len, default={})
        names = dict.fromkeys((*first, *(name for row in self._columns for name in row)))
        return [n for n in names if any(row.get(n) is not None for row in self._columns)]

    @property
    def body(self) -> list[list[str]]:
        """Values as text, empty where there is none."""
        return [[_text(row.get(name)) for name in self.head] for row in self._columns]

    def to_json(self) -> str:
        """A list of objects by column."""
        return json.dumps(self._columns, indent=1, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """With a head; RFC 4180 but for plain line ends."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.head)
        writer.writerows([row.get(name) for name in self.head] for row in self._columns)
        return text.getvalue()

    def to_markdown(self) -> str:
        """A table as GitHub reads it."""
        lines = [self.head, ["---"] * len(self.head), *self.body]
        return "".join(f"| {' | '.join(map(_escaped, line))} |\n" for line in lines)

    def to_svg(self) -> str | None:
        """Size against perplexity on the first text, a line per setting that is no budget.

        None while no cell has both.
        """
        lines: dict[str, list[tuple[float, float]]] = {}
        title = ""
        for row in self.rows:
            quality = row.quality
            if quality is None or quality.size is None or not quality.texts:
                continue
            text, measured = next(iter(quality.texts.items()))
            title = title or f"perplexity, {text}"
            settings = (v for path, v in row.axes.items() if not path.startswith("budget"))
            name = ", ".join(settings) or "all"
            lines.setdefault(name, []).append((quality.size / _MB, measured.perplexity))
        if not lines:
            return None
        series = []
        for number, (name, points) in enumerate(lines.items()):
            places, colour = tuple(sorted(points)), _COLOURS[number % len(_COLOURS)]
            series.append(Series(name, places, colour, line=True))
            series.append(Series(name, places, colour))
        legend = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(lines)}
        return svg_chart(series, x_title="checkpoint, MB", y_title=title, legend=legend)


def _text(value: str | int | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
