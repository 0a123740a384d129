"""Pieces of the HTML report: tables, blocks by modules, and a curve as inline SVG. Torch-free.

Colours are viridis, which keeps its order for colour-blind eyes and in grey; every colour stands
beside its number. Dropped groups, of width 0, are black.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count, groupby

WIDTH_COLOURS = {
    0: "#000000",
    1: "#440154",
    2: "#443983",
    3: "#31688e",
    4: "#21918c",
    5: "#35b779",
    6: "#90d743",
    7: "#c8e020",
    8: "#fde725",
}
_SCALE = ("#440154", "#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#fde725")
TEXT_COLOURS = ("#d95f02", "#7570b3", "#1b9e77")
"""Colours of evaluation texts, in order, told apart by colour-blind eyes."""
_EXPERT = re.compile(r"\.\d+\.")
_LIGHT_FROM = 0.4
"""Luminance above which black text reads better than white."""


class Html(str):
    """Text that is HTML already."""


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    over: str = "",
    ours: int | None = None,
    kind: str = "plain",
) -> str:
    """HTML table of texts, which are escaped unless they are `Html`.

    over: HTML of a row above the head; ours: number of the row to stress; kind: its CSS classes.
    """
    stressed = {ours: " class=ours"}
    body = "".join(
        f"<tr{stressed.get(i, '')}>{''.join(f'<td>{_html(cell)}</td>' for cell in row)}</tr>"
        for i, row in enumerate(rows)
    )
    heads = "".join(f"<th scope=col>{_html(name)}</th>" for name in head)
    title = f"<caption>{_html(caption)}</caption>" if caption else ""
    return (
        f'<div class=scroll><table class="{kind}">{title}<thead>{over}<tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _html(text: str) -> str:
    return text if isinstance(text, Html) else escape(text)


@dataclass(frozen=True)
class Cell:
    """One linear in a table of blocks by modules.

    text: the number shown; title: what hovering tells; background: a CSS colour; strip: CSS
    background of a bar below the number, or None.
    """

    text: str
    title: str
    background: str
    strip: str | None = None


def split_name(name: str) -> tuple[str, str]:
    """("model.layers.3", "mlp.up_proj") of a full name; the block is empty where it has none."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: place + 1]), ".".join(parts[place + 1 :])
    return "", name


def block_places(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """(block, module) -> names of its linears; the experts of a layer share a module's place."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        block, module = split_name(name)
        found.setdefault((block, _EXPERT.sub(".*.", module)), []).append(name)
    return found


def short_name(module: str) -> str:
    """A module's name without what every model has in common."""
    for prefix in ("self_attn.", "mlp."):
        module = module.replace(prefix, "")
    return module


def block_table(cells: Mapping[str, Cell], caption: str) -> str:
    """HTML table with a row per block and a column per module; `cells` by full name."""
    places = {name: split_name(name) for name in cells}
    blocks = list(dict.fromkeys(block for block, _ in places.values()))
    modules = list(dict.fromkeys(module for _, module in places.values()))
    by_place = {place: cells[name] for name, place in places.items()}
    head = "".join(f"<th scope=col>{escape(short_name(module))}</th>" for module in modules)
    rows = []
    for block in blocks:
        label = block.rpartition(".")[2] or "-"
        found = "".join(_cell(by_place.get((block, module))) for module in modules)
        rows.append(f"<tr><th scope=row>{escape(label)}</th>{found}</tr>")
    return (
        f"<div class=scroll><table class=map><caption>{escape(caption)}</caption>"
        f"<thead><tr><th scope=col>block</th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def width_strip(widths: Sequence[int]) -> str:
    """CSS background with one band per group, in column order."""
    stops, start = [], 0
    for width, run in groupby(widths):
        end = start + len(list(run))
        left, right = (f"{100 * edge / len(widths):.4g}%" for edge in (start, end))
        stops.append(f"{WIDTH_COLOURS[width]} {left} {right}")
        start = end
    return f"linear-gradient(90deg,{','.join(stops)})"


def mean_colour(width: float) -> str:
    """Colour of a mean width, between those of its neighbours."""
    known = sorted(WIDTH_COLOURS)
    low = max((w for w in known if w <= width), default=known[0])
    high = min((w for w in known if w >= width), default=known[-1])
    share = (width - low) / (high - low) if high > low else 0.0
    return _mix(WIDTH_COLOURS[low], WIDTH_COLOURS[high], share)


def log_colours(values: Iterable[float]) -> Callable[[float], str]:
    """Colour of a positive value by its logarithm between the smallest and the largest."""
    logs = [math.log(value) for value in values if value > 0]
    low, high = min(logs, default=0.0), max(logs, default=0.0)

    def colour(value: float) -> str:
        if value <= 0 or high == low:
            return _SCALE[0]
        place = (math.log(value) - low) / (high - low) * (len(_SCALE) - 1)
        index = min(int(place), len(_SCALE) - 2)
        return _mix(_SCALE[index], _SCALE[index + 1], place - index)

    return colour


def ink(colour: str) -> str:
    """Black or white, whichever reads better on the colour."""
    return "#000" if _luminance(colour) > _LIGHT_FROM else "#fff"


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one kind; a line where `line`, else marks with a label each.

    below: labels stand below their marks, not above. errors: of y, one per point, drawn both ways.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    colour: str
    line: bool = False
    labels: tuple[str, ...] = ()
    below: bool = False
    errors: tuple[float, ...] = ()


def line_chart(series: Sequence[Series], *, x_title: str, y_title: str, log_x: bool = False) -> str:
    """SVG with a logarithmic y axis; points with y <= 0 are left out.

    log_x: the x axis is logarithmic too, and all x must be positive.
    """
    kept = [(s, [(x, y) for x, y in s.points if y > 0]) for s in series]
    xs = [x for _, points in kept for x, _ in points]
    ys = [y for _, points in kept for _, y in points]
    frame = _Frame.around(xs, ys, log_x)
    parts = [frame.axes(x_title, y_title)]
    for one, points in kept:
        places = [frame.place(x, y) for x, y in points]
        if one.errors:
            parts.append(_bars(one, frame))
        parts.append(_line(one, places) if one.line else _marks(one, places, points))
    return (
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(y_title)} against {escape(x_title)}">{"".join(parts)}</svg>'
    )


def svg_chart(
    series: Sequence[Series], *, x_title: str, y_title: str, legend: Mapping[str, str]
) -> str:
    """`line_chart` as a file of its own, with names and their colours below it."""
    chart = line_chart(series, x_title=x_title, y_title=y_title)
    names = "".join(
        f'<circle cx="100" cy="{at}" r="6" fill="{colour}"/>'
        + _text(f'x="114" y="{at + 4}"', name[:_LONGEST_NAME])
        for at, (name, colour) in zip(count(400, 20), legend.items(), strict=False)
    )
    height = 400 + 20 * len(legend)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {height}" '
        'font-family="sans-serif" font-size="13" fill="#222">'
        "<style>.grid{stroke:#ddd}.title{font-weight:600}</style>"
        f'<rect width="860" height="{height}" fill="#fff"/>'
    )
    return f"{head}{chart.replace('<svg ', _INNER, 1)}{names}</svg>\n"


_INNER = '<svg width="860" height="380" '
_LONGEST_NAME = 110


@dataclass(frozen=True)
class _Frame:
    """Plot area and its scales; the bounds of logarithmic axes are exponents of ten."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log_x: bool = False
    width: int = 860
    height: int = 380
    left: int = 86
    right: int = 30
    top: int = 18
    bottom: int = 56

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float], log_x: bool) -> _Frame:
        low, high = (math.log10(x) if log_x else x for x in (min(xs), max(xs)))
        margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
        y_low, y_high = math.log10(min(ys)), math.log10(max(ys))
        return cls(low - margin, high + margin, y_low - 0.12, y_high + 0.12, log_x)

    def place(self, x: float, y: float) -> tuple[float, float]:
        return self.across(x), self.down(y)

    def across(self, x: float) -> float:
        """Distance of a value from the left edge."""
        at = math.log10(x) if self.log_x else x
        share = (at - self.x_low) / (self.x_high - self.x_low)
        return self.left + share * (self.width - self.left - self.right)

    def down(self, y: float) -> float:
        """Distance of a value from the upper edge."""
        up = (math.log10(y) - self.y_low) / (self.y_high - self.y_low)
        return self.top + (1 - up) * (self.height - self.top - self.bottom)

    def axes(self, x_title: str, y_title: str) -> str:
        """Grid lines with their values, and the titles of both axes."""
        floor, right = self.height - self.bottom, self.width - self.right
        parts = []
        steps = _log_steps if self.log_x else _round_steps
        for value in steps(self.x_low, self.x_high):
            x = f"{self.across(value):.1f}"
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{self.top}" y2="{floor}"/>')
            parts.append(_text(f'x="{x}" y="{floor + 18}" text-anchor="middle"', f"{value:g}"))
        for value in _log_steps(self.y_low, self.y_high):
            y = self.down(value)
            ends = f'x1="{self.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"'
            parts.append(f'<line class="grid" {ends}/>')
            spot = f'x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end"'
            parts.append(_text(spot, f"{value:g}"))
        below = f'x="{(self.left + right) / 2:.0f}" y="{self.height - 12}"'
        beside = f'transform="translate(18 {(self.top + floor) / 2:.0f}) rotate(-90)"'
        parts.append(_text(f'class="title" {below} text-anchor="middle"', x_title))
        parts.append(_text(f'class="title" {beside} text-anchor="middle"', y_title))
        return "".join(parts)


def _text(attributes: str, content: str) -> str:
    return f"<text {attributes}>{escape(content)}</text>"


def _line(one: Series, places: Sequence[tuple[float, float]]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{path}" fill="none" stroke="{one.colour}" stroke-width="2.5"/>'


def _marks(
    one: Series, places: Sequence[tuple[float, float]], points: Sequence[tuple[float, float]]
) -> str:
    """Marks lie above all labels, so that no label hides one."""
    labels = one.labels or ("",) * len(points)
    shift = 18 if one.below else -8
    texts, circles = [], []
    for (x, y), (value, loss), label in zip(places, points, labels, strict=True):
        told = f"{label or one.name}: {value:g}, {loss:.4g}"
        texts.append(_text(f'class="label" x="{x + 10:.1f}" y="{y + shift:.1f}"', label))
        circles.append(
            f'<g><title>{escape(told)}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="6" '
            f'fill="{one.colour}" stroke="#fff" stroke-width="1.5"/></g>'
        )
    return "".join(texts + circles)


def _bars(one: Series, frame: _Frame) -> str:
    """A vertical bar of one error each way; what reaches below the axis ends there."""
    bars = []
    for (x, y), error in zip(one.points, one.errors, strict=True):
        if y <= 0:
            continue
        across, top = frame.across(x), frame.down(y + error)
        floor = frame.height - frame.bottom
        low = min(frame.down(y - error), floor) if error < y else floor
        bars.append(f"M{across:.1f} {top:.1f}V{low:.1f}m-4 0h8M{across - 4:.1f} {top:.1f}h8")
    return f'<path d="{"".join(bars)}" fill=none stroke="{one.colour}" stroke-width=1.5 />'


def _round_steps(low: float, high: float) -> list[float]:
    """About six round values from low to high."""
    raw = (high - low) / 6
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def _log_steps(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two exponents; powers alone over four decades."""
    heads = (1, 2, 5) if high - low < 4 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    values = [float(f"{head}e{power}") for power in powers for head in heads]
    return [value for value in values if low <= math.log10(value) <= high]


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td class=none></td>"
    strip = f'<i style="background:{cell.strip}"></i>' if cell.strip else ""
    return (
        f'<td title="{escape(cell.title)}" style="background:{cell.background};'
        f'color:{ink(cell.background)}">{escape(cell.text)}{strip}</td>'
    )


def _channels(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return red, green, blue


def _mix(first: str, second: str, share: float) -> str:
    pairs = zip(_channels(first), _channels(second), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _luminance(colour: str) -> float:
    red, green, blue = _channels(colour)
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255
