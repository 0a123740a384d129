"""`bitmill report DIR --html FILE`: what a packed checkpoint is, on one self-contained page.

Reads `bit_width_map.json` and `quality.json`, and `profile_summary.json` where there is one. The
page loads nothing: styles and drawings are inside it, there is no script, and every colour comes
with its number. Torch-free.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.io.atomic import write_bytes
from bitmill.io.targets import check_file
from bitmill.reporting.charts import (
    TEXT_COLOURS,
    WIDTH_COLOURS,
    Cell,
    Html,
    Series,
    block_table,
    ink,
    line_chart,
    log_colours,
    mean_colour,
    table,
    width_strip,
)
from bitmill.reporting.learning import held_out_change, text_changes
from bitmill.reporting.summary import SUMMARY_NAME, ProfileSummary
from bitmill.results import (
    QUALITY_NAME,
    BlockQuality,
    CheckedMap,
    QualityReport,
    QualityRow,
    TuningQuality,
    with_error,
)

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
.plain th:first-child,.plain td:first-child,.notes th:last-child,.notes td:last-child
{text-align:left}
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

_MADE_BY = '<meta name="generator" content="Bitmill">'


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
            QualityReport.load(folder / QUALITY_NAME),
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
    """Write the page for a packed folder, over an earlier page alone.

    Raises FormatError as `ReportData.read` does, InputError (code `output_exists`).
    """
    check_file(target, is_report, param="html")
    write_bytes(target, render(ReportData.read(folder)).encode())


def is_report(data: bytes) -> bool:
    """Whether a file's content is such a page."""
    return _MADE_BY.encode() in data


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
        checked_maps(data.quality.checks),
        predicted_against_measured(data.quality.rows),
        _learning(data.quality),
        _linears(data),
        _times(data),
    ]
    title = f"{escape(data.name)} - Bitmill report"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"{_MADE_BY}"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _head(data: ReportData) -> str:
    tiles = []
    if ours := data.ours:
        tiles.append(("code bits per weight", _figure(ours.code_bits, ".3f")))
        tiles.append(("bits per weight", _figure(ours.bits, ".3f")))
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
    rows = data.quality.rows
    if not rows:
        return ""
    texts = list(dict.fromkeys(text for row in rows for text in row.texts))
    over = "".join(f"<th class=over colspan=3 scope=colgroup>{escape(t)}</th>" for t in texts)
    measured = "; ".join(
        f"{text}: {found.windows} windows, {found.tokens:,} predicted tokens"
        for text in texts
        if (found := next(row.texts[text] for row in rows if text in row.texts))
    )
    begins = "".join(
        f" Windows of {kind} begin with {what}." for kind, what in data.quality.begins.items()
    )
    return "<h2>Quality</h2>" + table(
        [
            "method",
            "code bits",
            "bits",
            "size",
            *["perplexity", "KL, nats/token", "top-1"] * len(texts),
        ],
        [_quality_cells(row, texts) for row in rows],
        caption="± is one standard error over windows; top-1 is how often the most likely next "
        f"token is the source's. {measured}.{begins}",
        over=f"<tr><td colspan=4 class=over></td>{over}</tr>",
        ours=rows.index(data.ours) if data.ours else None,
    )


def _quality_cells(row: QualityRow, texts: Sequence[str]) -> list[str]:
    cells = [row.method, _figure(row.code_bits, ".3f"), _figure(row.bits, ".3f"), _bytes(row.size)]
    for text in texts:
        found = row.texts.get(text)
        if found is None:
            cells += ["", "", ""]
            continue
        reference = row.method == "source"
        cells.append(with_error(found.perplexity, found.perplexity_se, ".2f"))
        cells.append("" if reference else with_error(found.kl, found.kl_se, ".4f"))
        cells.append("" if reference else f"{100 * found.top1_agreement:.1f} %")
    return cells


def task_table(rows: Sequence[QualityRow]) -> str:
    """HTML section with a column per lm-evaluation-harness task and metric, or nothing."""
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
    samples = ", ".join(f"{task}: {found.samples}" for task, found in measured[0].tasks.items())
    return "<h2>Tasks</h2>" + table(
        ["method", *(f"{task}, {metric}" for task, metric in columns)],
        [[row.method, *(_score(row, *column) for column in columns)] for row in measured],
        caption="± is one standard error over samples, as the harness gives it. Samples: "
        f"{samples}.",
    )


def _score(row: QualityRow, task: str, metric: str) -> str:
    found = row.tasks[task].metrics.get(metric) if task in row.tasks else None
    if found is None:
        return ""
    return f"{found.value:.4f}" + ("" if found.se is None else f" ± {found.se:.4f}")


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
        + line_chart(series, x_title="bits per weight", y_title="increase of loss, nats/token")
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


def checked_maps(checks: Sequence[CheckedMap]) -> str:
    """HTML section on the choice of the map; empty where none was measured."""
    if not checks:
        return ""
    return (
        "<h2>Maps on held-out windows</h2><p>Each map, quantized in haste, against the source "
        "model on held-out windows of the calibration text; the one that loses least was "
        "taken. nats/token.</p>"
        + table(
            ["map", "bits", "predicted", "measured KL", "predicted / measured"],
            [
                [
                    check.method,
                    f"{check.bits:.3f}",
                    f"{check.predicted_loss:.4g}",
                    with_error(check.kl, check.kl_se, ".4f"),
                    f"{check.predicted_loss / check.kl:.2f}" if check.kl > 0 else "",
                ]
                for check in checks
            ],
            caption="± is one standard error over windows.",
            ours=next(i for i, check in enumerate(checks) if check.taken),
        )
    )


def predicted_against_measured(rows: Sequence[QualityRow]) -> str:
    """HTML section on trust: the loss that the profile predicts against what was measured.

    Both are increases of the mean negative log-likelihood over the source model, nats per token.
    The profile adds up second-order costs of single groups on the calibration text; the measurement
    is of the whole model on an evaluation text. Points far above the diagonal mean that costs no
    longer add up. Empty where no row has a prediction.
    """
    known = [row for row in rows if row.predicted_loss is not None and row.texts]
    if not known:
        return ""
    texts = list(dict.fromkeys(text for row in known for text in row.texts))
    measured = [name for text in texts for name in (text, "measured / predicted")]
    return (
        "<h2>Predicted against measured loss</h2><p>Increase of the loss over the source model, "
        "nats/token. The profile predicts it from the calibration text for these widths in the "
        "profile's column order; the other columns are measured. Where both agree, the size-loss "
        "curve can be trusted at that size.</p>"
        + table(
            ["method", "code bits", "predicted", *measured],
            [_loss_cells(row, texts) for row in known],
            caption="± is one standard error of the paired difference over windows.",
        )
        + _loss_plot(known, texts)
    )


def _loss_cells(row: QualityRow, texts: Sequence[str]) -> list[str]:
    predicted = row.predicted_loss or 0.0
    cells = [row.method, _figure(row.code_bits, ".3f"), f"{predicted:.4g}"]
    for text in texts:
        found = row.texts.get(text)
        if found is None:
            cells += ["", ""]
            continue
        cells.append(with_error(found.loss_increase, found.loss_increase_se, ".4f"))
        cells.append(f"{found.loss_increase / predicted:.2f}" if predicted > 0 else "")
    return cells


def _loss_plot(rows: Sequence[QualityRow], texts: Sequence[str]) -> str:
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


def _learning(report: QualityReport) -> str:
    """A row per learned block, and the tuning of scales; empty where nothing learned."""
    blocks = report.blocks
    if not blocks:
        return ""
    changes = text_changes(blocks)
    mean = [f"{held_out_change(blocks):+.1%}", *(f"{c:+.1%}" for c in changes.values())]
    spent = f"{sum(block.seconds for block in blocks):,.1f}"
    total = ["mean change, sum of seconds", "", "", "", *mean, "", "", spent]
    taken = (
        "<p>Learned by an earlier job, whose report this is; nothing was trained.</p>"
        if report.resumed
        else ""
    )
    return (
        f"<h2>Learning</h2>{taken}<p>Error of each block's output on held-out calibration text, "
        "with its first solution and with what was kept. The held-out text decided what is kept; "
        "the other texts decided nothing.</p>"
        + table(
            [
                *("block", "kept", "error before", "error after", "change"),
                *(f"change on {name}" for name in changes),
                *("best of steps", "rollbacks", "seconds"),
            ],
            [*(_block_cells(block, list(changes)) for block in blocks), total],
            caption=f"mode {blocks[0].mode}; means of changes are geometric",
            ours=len(blocks),
        )
        + _tuning(report.tuning)
    )


def _block_cells(block: BlockQuality, texts: Sequence[str]) -> list[str]:
    pairs = [(block.loss_before, block.loss_after), *(block.texts[name] for name in texts)]
    changes = [f"{after / before - 1:+.1%}" if before > 0 else "" for before, after in pairs]
    return [
        str(block.index),
        block.kept,
        f"{block.loss_before:.4g}",
        f"{block.loss_after:.4g}",
        *changes,
        f"{block.best_step} of {block.steps}" + (", gave up" if block.gave_up else ""),
        str(block.rollbacks),
        f"{block.seconds:.1f}",
    ]


def _tuning(tuning: TuningQuality | None) -> str:
    if tuning is None:
        return ""
    pairs = {"held-out calibration text": (tuning.kl_before, tuning.kl_after), **tuning.texts}
    kept = "kept" if tuning.kept else "not kept"
    return (
        f"<p>All scales were then tuned together and {kept}: best of {tuning.steps} steps at "
        f"{tuning.best_step}, {tuning.rollbacks} rollbacks, {tuning.seconds:,.1f} seconds.</p>"
        + table(
            ["KL, nats/token", "before", "after"],
            [[name, f"{a:.4g}", f"{b:.4g}"] for name, (a, b) in pairs.items()],
        )
    )


def _linears(data: ReportData) -> str:
    if not data.quality.linears:
        return ""
    worst = sorted(data.quality.linears, key=lambda linear: -linear.relative_error)
    noted = [linear for linear in data.quality.linears if linear.notes]
    shown = list(dict.fromkeys([*noted, *worst[:WORST_LINEARS]]))
    return "<h2>Linears to look at</h2>" + table(
        ["linear", "code bits", "relative error", "damping", "gain of scale refit", "notes"],
        [
            [
                Html(f"<code>{escape(linear.name)}</code>"),
                f"{linear.code_bits:.3f}",
                f"{linear.relative_error:.3g}",
                _figure(linear.damping, ".3g"),
                _figure(linear.scale_refit_gain, ".1%"),
                "; ".join(linear.notes),
            ]
            for linear in shown
        ],
        caption=f"Those with notes, then the {WORST_LINEARS} of largest relative error.",
        kind="plain notes",
    )


def _times(data: ReportData) -> str:
    seconds = data.quality.seconds.items()
    if not seconds:
        return ""
    return "<h2>Time</h2>" + table(
        ["stage", "seconds"], [[stage, f"{spent:,.1f}"] for stage, spent in seconds]
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
