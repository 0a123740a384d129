"""`bitmill report DIR --html FILE`: what a packed checkpoint is, on one self-contained page.

Reads `bit_width_map.json` and `quality.json`, and `profile_summary.json` where there is one. The
page loads nothing: styles and drawings are inside it, there is no script, and every colour comes
with its number. Torch-free.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.io.atomic import write_bytes
from bitmill.reporting.charts import (
    WIDTH_COLOURS,
    Cell,
    Series,
    block_table,
    ink,
    line_chart,
    log_colours,
    mean_colour,
    width_strip,
)
from bitmill.reporting.learning import learning_section
from bitmill.reporting.losses import predicted_against_measured
from bitmill.reporting.summary import SUMMARY_NAME, ProfileSummary
from bitmill.reporting.tasks import task_table
from bitmill.results import LinearResult, QualityReport, QualityRow

WORST_LINEARS = 20

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5b6570;--line:#d5dae0;--page:#fff;
--card:#f5f7f9;--mark:#31688e}
@media (prefers-color-scheme:dark){
:root{--ink:#e6e9ec;--soft:#9aa5b0;--line:#3a424b;--page:#15181c;--card:#1e2329;--mark:#6fb1dd}}
*{box-sizing:border-box}
body{margin:0 auto;padding:28px 24px 60px;max-width:1180px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI","DejaVu Sans",sans-serif}
h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:40px 0 8px}
p{margin:6px 0;max-width:80ch}.soft,caption{color:var(--soft)}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:18px 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 16px}
.tile b{display:block;font-size:21px;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;font-size:13px;padding-bottom:6px}
.plain th,.plain td{padding:5px 9px;border-bottom:1px solid var(--line);text-align:right;
font-size:14px;white-space:nowrap}
.plain .over{text-align:center;border-bottom:none}
.plain th:first-child,.plain td:first-child,.plain .text{text-align:left}
.plain tr.ours{font-weight:600;background:var(--card)}
.scroll{overflow-x:auto}
.map th{font-weight:500;font-size:12px;color:var(--soft);padding:2px 6px;text-align:left}
.map{width:100%}
.map td{min-width:74px;padding:2px 6px 5px;border:1px solid var(--page);font-size:12px;
text-align:center}
.map td i{display:block;height:9px;margin-top:2px;border:1px solid #fff;border-radius:2px}
.map td.none{background:var(--card)}
.key{display:flex;flex-wrap:wrap;gap:6px;margin:8px 0 12px}
.key span{padding:2px 10px;border-radius:4px;font-size:13px}
svg{width:100%;max-width:900px;height:auto;font:12px system-ui,"DejaVu Sans",sans-serif}
svg text{fill:var(--soft)}svg .title,svg .label{fill:var(--ink);font-size:13px}
svg .label{paint-order:stroke;stroke:var(--page);stroke-width:4px}
svg .grid{stroke:var(--line)}
code{font-size:13px}
@media print{.scroll{overflow:visible}}
"""


@dataclass(frozen=True)
class ReportData:
    """The files of a packed folder that a report is made from."""

    name: str
    map: BitWidthMap
    quality: QualityReport
    profile: ProfileSummary | None

    @classmethod
    def read(cls, folder: Path) -> ReportData:
        """Raises FormatError where the map or the quality report is missing or damaged."""
        summary = folder / SUMMARY_NAME
        return cls(
            folder.resolve().name,
            BitWidthMap.load(folder / MAP_NAME),
            QualityReport.load(folder / "quality.json"),
            ProfileSummary.load(summary) if summary.is_file() else None,
        )

    @property
    def ours(self) -> QualityRow | None:
        """The row of the checkpoint itself: the first after the source's."""
        return next((row for row in self.quality.rows if row.method != "source"), None)

    @property
    def source(self) -> QualityRow | None:
        """The source model's row."""
        return next((row for row in self.quality.rows if row.method == "source"), None)


def write_report(folder: Path, target: Path) -> None:
    """Write the page for a packed folder. Raises FormatError as `ReportData.read` does."""
    write_bytes(target, render(ReportData.read(folder)).encode())


def render(data: ReportData) -> str:
    """The page's HTML."""
    sections = [
        _head(data),
        _warnings(data),
        _quality_table(data),
        task_table(data.quality.rows),
        _width_map(data),
        _sensitivity(data),
        _errors(data),
        _curve(data),
        predicted_against_measured(data.quality.rows),
        learning_section(data.quality),
        _linears(data),
        _times(data),
    ]
    title = f"{escape(data.name)} - Bitmill report"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _head(data: ReportData) -> str:
    tiles = []
    if ours := data.ours:
        tiles.append(("code bits per weight", _figure(ours.code_bits, ".3f")))
        tiles.append(("bits per weight, all stored", _figure(ours.bits, ".3f")))
        tiles.append(("safetensors files", _bytes(ours.size)))
        for text, quality in ours.texts.items():
            before = data.source.texts.get(text) if data.source else None
            source = f" (source {before.perplexity:.2f})" if before else ""
            tiles.append((f"perplexity, {text}{source}", f"{quality.perplexity:.2f}"))
    groups = sum(map(len, data.map.linears.values()))
    boxes = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for name, value in tiles
    )
    method = escape(data.ours.method) if data.ours else "not evaluated"
    return (
        f"<h1>{escape(data.name)}</h1><p class=soft>{method}; {len(data.map.linears)} linears in "
        f"{groups} groups of up to {data.map.group_size} columns, {data.map.order} column order</p>"
        f"<div class=tiles>{boxes}</div>"
    )


def _warnings(data: ReportData) -> str:
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in data.quality.warnings)
    return f"<h2>Warnings</h2><ul>{warnings}</ul>" if warnings else ""


def _quality_table(data: ReportData) -> str:
    if not data.quality.rows:
        return ""
    texts = list(dict.fromkeys(text for row in data.quality.rows for text in row.texts))
    over = "".join(f"<th class=over colspan=3 scope=colgroup>{escape(t)}</th>" for t in texts)
    head = "".join(
        f"<th scope=col>{what}</th>"
        for _ in texts
        for what in ("perplexity", "KL, nats/token", "top-1")
    )
    rows = "".join(_quality_row(row, texts, row is data.ours) for row in data.quality.rows)
    measured = "; ".join(
        f"{text}: {found.windows} windows, {found.tokens:,} predicted tokens"
        for text in texts
        if (found := next(r.texts[text] for r in data.quality.rows if text in r.texts))
    )
    return (
        "<h2>Quality</h2><div class=scroll><table class=plain>"
        "<caption>± is one standard error over windows; top-1 is how often the most likely "
        f"next token is the source's. {escape(measured)}.</caption>"
        f"<thead><tr><td colspan=4 class=over></td>{over}</tr>"
        "<tr><th scope=col>method</th><th scope=col>code bits</th><th scope=col>bits</th>"
        f"<th scope=col>size</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _quality_row(row: QualityRow, texts: list[str], ours: bool) -> str:
    cells = [_figure(row.code_bits, ".3f"), _figure(row.bits, ".3f"), _bytes(row.size)]
    for text in texts:
        found = row.texts.get(text)
        if found is None:
            cells += ["", "", ""]
            continue
        reference = row.method == "source"
        cells.append(f"{found.perplexity:.2f} ± {found.perplexity_se:.2f}")
        cells.append("" if reference else f"{found.kl:.4f} ± {found.kl_se:.4f}")
        cells.append("" if reference else f"{100 * found.top1_agreement:.1f} %")
    body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f"<tr{' class=ours' if ours else ''}><td>{escape(row.method)}</td>{body}</tr>"


def _width_map(data: ReportData) -> str:
    counts = Counter(width for widths in data.map.linears.values() for width in widths)
    total = sum(counts.values())
    key = "".join(
        f'<span style="background:{WIDTH_COLOURS[width]};color:{ink(WIDTH_COLOURS[width])}">'
        f"{width} bits: {100 * counts[width] / total:.1f} %</span>"
        for width in sorted(counts)
    )
    cells = {}
    for name, widths in data.map.linears.items():
        mean = sum(widths) / len(widths)
        title = f"{name}: {''.join(map(str, widths))}"
        cells[name] = Cell(f"{mean:.2f}", title, mean_colour(mean), width_strip(widths))
    return (
        "<h2>Bit widths</h2><p>Each cell is one linear: its mean width over groups, and below it "
        "one band per group of columns in packed order. Shares below are of groups.</p>"
        f"<div class=key>{key}</div>{block_table(cells, 'mean width, by block and module')}"
    )


def _sensitivity(data: ReportData) -> str:
    if data.profile is None:
        return ""
    sums = {name: sum(linear.groups) for name, linear in data.profile.linears.items()}
    colour = log_colours(sums.values())
    cells = {}
    for name, linear in data.profile.linears.items():
        peak = max(linear.groups)
        title = (
            f"{name}: {sums[name]:.3g} nats/token at {data.profile.reference_width} bits, "
            f"{linear.predicted_loss:.3g} as allocated; most sensitive group {peak:.3g}"
        )
        cells[name] = Cell(f"{sums[name]:.1e}", title, colour(sums[name]))
    caption = f"predicted increase of the loss, nats/token, at {data.profile.reference_width} bits"
    return (
        "<h2>Sensitivity</h2><p>What each linear would cost the model if all its groups had "
        f"{data.profile.reference_width} bits and nothing else were quantized.</p>"
        f"{block_table(cells, caption)}"
    )


def _errors(data: ReportData) -> str:
    if not data.quality.linears:
        return ""
    colour = log_colours(linear.relative_error for linear in data.quality.linears)
    cells = {
        linear.name: Cell(
            f"{100 * linear.relative_error:.2f} %",
            f"{linear.name}: {linear.relative_error:.3g} at {linear.code_bits:.3f} code bits",
            colour(linear.relative_error),
        )
        for linear in data.quality.linears
    }
    return (
        "<h2>Error of each linear</h2><p>Relative error of the outputs on the calibration inputs, "
        "tr(R H Rᵀ) / tr(W H Wᵀ) with R the change of the weight and H the inputs' second "
        f"moments.</p>{block_table(cells, 'relative output error')}"
    )


def _curve(data: ReportData) -> str:
    if data.profile is None or not data.profile.curve:
        return ""
    line = tuple((point.bits, point.predicted_loss) for point in data.profile.curve)
    series = [Series("predicted", line, "var(--mark)", line=True)]
    if data.ours and data.ours.bits is not None and data.quality.predicted_loss:
        here = ((data.ours.bits, data.quality.predicted_loss),)
        label = ("this map, predicted",)
        series.append(Series("predicted", here, "var(--mark)", labels=label, below=True))
    series += _measured(data)
    smallest, largest = data.profile.curve[0], data.profile.curve[-1]
    return (
        "<h2>Size against loss</h2><p>The line is the profile's prediction for the best map at "
        f"each size, from {_bytes(smallest.size)} to {_bytes(largest.size)}. Orange marks are "
        "measured: ln of the perplexity's ratio to the source's.</p>"
        + line_chart(
            series, x_title="bits per weight, all stored", y_title="increase of loss, nats/token"
        )
    )


def _measured(data: ReportData) -> list[Series]:
    """Increase of the loss on the first text, of every row that has a size."""
    if data.source is None or not data.source.texts:
        return []
    text, before = next(iter(data.source.texts.items()))
    points, labels = [], []
    for row in data.quality.rows:
        found = row.texts.get(text)
        if row is data.source or found is None or row.bits is None:
            continue
        loss = math.log(found.perplexity / before.perplexity)
        if loss > 0:
            points.append((row.bits, loss))
            labels.append(f"{row.method}, measured")
    return [Series("measured", tuple(points), "#d95f02", labels=tuple(labels))]


def _linears(data: ReportData) -> str:
    if not data.quality.linears:
        return ""
    worst = sorted(data.quality.linears, key=lambda linear: -linear.relative_error)
    noted = [linear for linear in data.quality.linears if linear.notes]
    shown = list(dict.fromkeys([*noted, *worst[:WORST_LINEARS]]))
    rows = "".join(map(_linear_row, shown))
    return (
        "<h2>Linears to look at</h2><div class=scroll><table class=plain><caption>Those with "
        f"notes, then the {WORST_LINEARS} of largest relative error.</caption><thead><tr>"
        "<th scope=col>linear</th><th scope=col>code bits</th><th scope=col>relative error</th>"
        "<th scope=col>damping</th><th scope=col>gain of scale refit</th>"
        f"<th scope=col class=text>notes</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _linear_row(linear: LinearResult) -> str:
    cells = [
        f"{linear.code_bits:.3f}",
        f"{linear.relative_error:.3g}",
        _figure(linear.damping, ".3g"),
        "" if linear.scale_refit_gain is None else f"{100 * linear.scale_refit_gain:.1f} %",
    ]
    body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    notes = escape("; ".join(linear.notes))
    return f"<tr><td><code>{escape(linear.name)}</code></td>{body}<td class=text>{notes}</td></tr>"


def _times(data: ReportData) -> str:
    if not data.quality.seconds:
        return ""
    rows = "".join(
        f"<tr><td>{escape(stage)}</td><td>{seconds:,.1f}</td></tr>"
        for stage, seconds in data.quality.seconds.items()
    )
    return (
        "<h2>Time</h2><table class=plain><thead><tr><th scope=col>stage</th>"
        f"<th scope=col>seconds</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _bytes(size: int | None) -> str:
    if size is None:
        return ""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 1000 * factor else f"{size:,} B"
    return f"{size} B"
