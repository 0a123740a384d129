"""A bit-width map as one SVG drawing: blocks by modules, a band of colour for every group.

The drawing needs nothing else and reads on light and dark grounds. Experts of a layer share one
place, with the groups of all of them. Torch-free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from itertools import groupby

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.reporting.charts import WIDTH_COLOURS, block_places, short_name

_LEFT, _TOP, _WIDE, _HIGH, _GAP = 40, 46, 112, 12, 2
_INK = "#7a828a"
_TITLE = "Bit-width map:"


def map_svg(found: BitWidthMap) -> str:
    """The drawing of a map; identical groups side by side become one rectangle."""
    places = block_places(found.linears)
    blocks = list(dict.fromkeys(block for block, _ in places))
    modules = list(dict.fromkeys(module for _, module in places))
    bands: dict[int, list[str]] = {}
    for (block, module), names in places.items():
        widths = [width for name in names for width in found.linears[name]]
        x = _LEFT + modules.index(module) * _WIDE
        y = _TOP + blocks.index(block) * _HIGH
        _add_bands(bands, widths, x, y)
    right, floor = _LEFT + len(modules) * _WIDE, _TOP + len(blocks) * _HIGH
    texts = [
        _text(_LEFT + i * _WIDE, _TOP - 6, short_name(module)) for i, module in enumerate(modules)
    ]
    step = 5 if len(blocks) > 10 else 1
    texts += [
        _text(_LEFT - 6, _TOP + i * _HIGH + _HIGH - 3, block.rpartition(".")[2] or "-", "end")
        for i, block in enumerate(blocks)
        if i % step == 0
    ]
    drawn = "".join(
        f'<path fill="{WIDTH_COLOURS[width]}" d="{"".join(parts)}"/>'
        for width, parts in sorted(bands.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 8} {floor + 8}" '
        f'width="{right + 8}" height="{floor + 8}" role="img" font-family="sans-serif" '
        f'font-size="11"><title>{escape(_summary(found))}</title>{_legend(sorted(bands))}'
        f"{''.join(texts)}{drawn}</svg>\n"
    )


def is_map_svg(data: bytes) -> bool:
    """Whether a file's content is such a drawing."""
    return data.lstrip().startswith(b"<svg ") and f"<title>{_TITLE}".encode() in data


def _add_bands(bands: dict[int, list[str]], widths: Sequence[int], x: int, y: int) -> None:
    room, start = _WIDE - _GAP, 0
    for width, run in groupby(widths):
        end = start + len(list(run))
        left, right = (round(room * edge / len(widths), 1) for edge in (start, end))
        path = f"M{x + left:g} {y}h{right - left:g}v{_HIGH - _GAP}h{left - right:g}z"
        bands.setdefault(width, []).append(path)
        start = end


def _legend(widths: Sequence[int]) -> str:
    parts = [_text(_LEFT, 16, "bits of a group:")]
    for place, width in enumerate(widths):
        x = _LEFT + 96 + place * 44
        parts.append(f'<rect x="{x}" y="7" width="14" height="10" fill="{WIDTH_COLOURS[width]}"/>')
        parts.append(_text(x + 19, 16, str(width)))
    return "".join(parts)


def _summary(found: BitWidthMap) -> str:
    counts = Counter(width for widths in found.linears.values() for width in widths)
    spread = ", ".join(f"{counts[width]} of {width} bits" for width in sorted(counts))
    return f"{_TITLE} {len(found.linears)} linears, {counts.total()} groups: {spread}"


def _text(x: int, y: int, content: str, anchor: str = "start") -> str:
    place = f'x="{x}" y="{y}" fill="{_INK}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(content)}</text>"
