"""Draws the pictures of docs/allocation.md from what a job left.

    bitmill quantize MODEL --out FOLDER ...       # see docs/allocation.md
    python scripts/pictures.py FOLDER             # takes its numbers and draws them
    python scripts/pictures.py                    # draws them again

The numbers are the job's `profile_summary.json` and `bit_width_map.json`, kept in
docs/pictures/allocation.json.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.reporting.charts import WIDTH_COLOURS, Series, short_name, split_name, svg_chart
from bitmill.reporting.summary import SUMMARY_NAME, ProfileSummary

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
NUMBERS = PICTURES / "allocation.json"
_COLOURS = ("#1f78b4", "#66a61e", "#a6761d", "#7570b3", "#d95f02", "#e7298a", "#1b9e77")
_DARK = "#222222"


def draw(summary: ProfileSummary, found: BitWidthMap) -> dict[str, str]:
    """Every picture as SVG, by its file's name."""
    return {
        "allocation_costs.svg": costs(summary, found),
        "allocation_kinds.svg": kinds(found),
        "allocation_curve.svg": size_curve(summary),
    }


def costs(summary: ProfileSummary, found: BitWidthMap) -> str:
    """Costs of groups at one width, largest first, of all and of those that got each width."""
    by_width: defaultdict[int, list[float]] = defaultdict(list)
    for name, linear in summary.linears.items():
        for width, cost in zip(found.linears[name], linear.groups, strict=True):
            by_width[width].append(cost)
    every = [cost for several in by_width.values() for cost in several]
    lines = {f"all {len(every)} groups": (every, _DARK)} | {
        f"the {len(by_width[width])} that got {width} bits": (by_width[width], WIDTH_COLOURS[width])
        for width in sorted(by_width, reverse=True)
    }
    series = [
        Series(name, tuple(enumerate(sorted(several, reverse=True), 1)), colour, line=True)
        for name, (several, colour) in lines.items()
    ]
    return svg_chart(
        series,
        x_title="groups, most expensive first",
        y_title=f"predicted loss at {summary.reference_width} bits, nats per token",
        legend={name: colour for name, (_, colour) in lines.items()},
    )


def kinds(found: BitWidthMap) -> str:
    """Mean width of each kind of linear, block by block."""
    lines: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, widths in found.linears.items():
        block, module = split_name(name)
        place = int(block.rpartition(".")[2])
        lines[short_name(module)].append((place, sum(widths) / len(widths)))
    legend = dict(zip(lines, _COLOURS, strict=True))
    series = [Series(kind, tuple(lines[kind]), legend[kind], line=True) for kind in lines]
    return svg_chart(series, x_title="block", y_title="mean bits of its groups", legend=legend)


def size_curve(summary: ProfileSummary) -> str:
    """What a budget buys: one profile, a map for every size."""
    points = tuple((point.size / 1e6, point.predicted_loss) for point in summary.curve)
    series = [
        Series("maps", points, _COLOURS[0], line=True),
        Series("maps", points, _COLOURS[0]),
    ]
    legend = {"one profile, a map for every size": _COLOURS[0]}
    return svg_chart(
        series,
        x_title="checkpoint, MB",
        y_title="predicted loss, nats per token",
        legend=legend,
    )


def main() -> None:
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        taken = {"summary": SUMMARY_NAME, "map": MAP_NAME}
        read = {key: json.loads((folder / name).read_text()) for key, name in taken.items()}
        NUMBERS.write_text(json.dumps(read, separators=(",", ":")) + "\n")
    numbers = json.loads(NUMBERS.read_text())
    summary = ProfileSummary.model_validate(numbers["summary"])
    found = BitWidthMap.model_validate(numbers["map"])
    for name, picture in draw(summary, found).items():
        (PICTURES / name).write_text(picture)


if __name__ == "__main__":
    main()
