"""The report is one page that loads nothing and shows the numbers of the folder's files."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bitmill.allocation.allocator import CurvePoint
from bitmill.config.bit_width_map import LEGAL_WIDTHS, BitWidthMap
from bitmill.errors import FormatError, InputError
from bitmill.reporting.charts import WIDTH_COLOURS, ink, log_colours, mean_colour, width_strip
from bitmill.reporting.html import write_report
from bitmill.reporting.summary import LinearSensitivity, ProfileSummary
from bitmill.results import (
    BlockQuality,
    LinearResult,
    QualityReport,
    QualityRow,
    TextQuality,
)
from learned_reports import tuning_quality

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
VOID = {"meta", "br", "line", "polyline", "circle"}


class Page(HTMLParser):
    """Checks nesting, and collects tags, attributes and the texts of cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def _text(perplexity: float, **changes: Any) -> TextQuality:
    return TextQuality(windows=5, tokens=10235, perplexity=perplexity, perplexity_se=0.5, **changes)


def folder_with(tmp_path: Path, *, profile: bool = True, **changes: Any) -> Path:
    folder = tmp_path / "tiny<3>"
    folder.mkdir()
    bit_widths = BitWidthMap(linears={UP: (3, 3, 4), DOWN: (2,)})
    (folder / "bit_width_map.json").write_text(bit_widths.to_json())
    source = QualityRow(method="source", texts={"wiki_evaluation": _text(18.0)})
    ours = QualityRow(
        method="knapsack gptq",
        code_bits=3.0,
        bits=3.21,
        size=96_123_456,
        texts={"wiki_evaluation": _text(25.5, kl=0.36, kl_se=0.01, top1_agreement=0.712)},
    )
    linears = (
        LinearResult(name=UP, code_bits=3.33, relative_error=0.0123, notes=("<b>damped</b>",)),
        LinearResult(name=DOWN, code_bits=2.0, relative_error=0.25),
    )
    given = {"rows": (source, ours), "predicted_loss": 0.3, "linears": linears} | changes
    (folder / "quality.json").write_text(QualityReport(**given).to_json())
    if profile:
        curve = [CurvePoint(size=s, bits=b, code_bits=b, predicted_loss=x) for s, b, x in CURVE]
        summary = ProfileSummary(
            profile_id="p",
            reference_width=3,
            linears={
                UP: LinearSensitivity(groups=(0.001, 0.002, 0.004), predicted_loss=0.003),
                DOWN: LinearSensitivity(groups=(0.02,), predicted_loss=0.09),
            },
            curve=tuple(curve),
        )
        (folder / "profile_summary.json").write_text(summary.to_json())
    return folder


CURVE = [(60_000_000, 2.1, 1.5), (90_000_000, 3.2, 0.31), (150_000_000, 6.2, 0.004)]


def page_of(folder: Path) -> tuple[str, Page]:
    target = folder / "report.html"
    write_report(folder, target)
    html = target.read_text()
    return html, Page(html)


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    html, _ = page_of(folder)
    assert page_of(folder)[0] == html
    for file in sorted(folder.glob("*.json")):
        before = file.read_bytes()
        with pytest.raises(InputError, match="is not replaced"):
            write_report(folder, file)
        assert file.read_bytes() == before


def test_the_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    html, page = page_of(folder_with(tmp_path))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object"}
    assert "url(" not in html
    assert "http" not in html
    assert all("src" not in attributes for _, attributes in page.tags)


def test_measured_numbers_are_in_the_table(tmp_path: Path) -> None:
    _, page = page_of(folder_with(tmp_path))
    for expected in (
        "knapsack gptq",
        "3.000",
        "3.210",
        "96.1 MB",
        "25.50 ± 0.50",
        "0.3600 ± 0.0100",
        "71.2 %",
        "18.00 ± 0.50",
    ):
        assert expected in page.cells


def test_every_linear_has_a_cell_with_its_widths(tmp_path: Path) -> None:
    html, page = page_of(folder_with(tmp_path))
    titles = {attributes.get("title") for tag, attributes in page.tags if tag == "td"}
    assert {f"{UP}: 334", f"{DOWN}: 2"} <= titles
    assert {"3.33", "2.00"} <= set(page.cells)
    assert f"{WIDTH_COLOURS[3]} 0% 66.67%,{WIDTH_COLOURS[4]} 66.67% 100%" in html
    assert "3 bits: 50.0 %" in html


def test_errors_and_sensitivities_are_shown(tmp_path: Path) -> None:
    html, page = page_of(folder_with(tmp_path))
    assert {"1.23 %", "25.00 %", "7.0e-03", "2.0e-02"} <= set(page.cells)
    assert "0.003 as allocated; most sensitive group 0.004" in html


def test_the_curve_has_the_line_and_the_measured_mark(tmp_path: Path) -> None:
    html, page = page_of(folder_with(tmp_path))
    lines = [attributes for tag, attributes in page.tags if tag == "polyline"]
    (points,) = (str(attributes["points"]).split() for attributes in lines)
    places = [tuple(map(float, point.split(","))) for point in points]
    assert len(places) == len(CURVE)
    assert places == sorted(places)
    assert [y for _, y in places] == sorted(y for _, y in places)
    assert "knapsack gptq, measured: 3.21, 0.3483" in html
    assert "this map, predicted: 3.21, 0.3" in html


def test_names_and_notes_are_escaped(tmp_path: Path) -> None:
    html, _ = page_of(folder_with(tmp_path))
    assert "&lt;b&gt;damped&lt;/b&gt;" in html
    assert "<b>damped" not in html
    assert "<title>tiny&lt;3&gt; - Bitmill report</title>" in html


@pytest.mark.parametrize("rows", ["none", "source alone"])
def test_a_folder_without_measurements_has_its_map(tmp_path: Path, rows: str) -> None:
    source = QualityRow(method="source", texts={"wiki_evaluation": _text(18.0)})
    folder = folder_with(
        tmp_path, profile=False, rows=() if rows == "none" else (source,), linears=()
    )
    html, page = page_of(folder)
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == (["Bit widths"] if rows == "none" else ["Quality", "Bit widths"])
    assert "3.33" in page.cells


def test_a_folder_without_a_quality_report_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "quality.json").unlink()
    with pytest.raises(FormatError, match=r"quality\.json"):
        write_report(folder, folder / "report.html")
    assert not (folder / "report.html").exists()


def test_colours_follow_the_numbers() -> None:
    assert mean_colour(3.0) == WIDTH_COLOURS[3]
    assert mean_colour(8.0) == WIDTH_COLOURS[8]
    assert list(WIDTH_COLOURS) == list(LEGAL_WIDTHS)
    assert mean_colour(2.5) not in WIDTH_COLOURS.values()
    assert (ink(WIDTH_COLOURS[1]), ink(WIDTH_COLOURS[8])) == ("#fff", "#000")
    colour = log_colours([1e-4, 1e-2])
    assert (colour(1e-4), colour(1e-3), colour(1e-2)) == ("#440154", "#21918c", "#fde725")
    assert log_colours([])(0.0) == log_colours([1.0, 1.0])(1.0) == "#440154"
    assert width_strip((2, 2, 3, 2)).count("#") == 3


def learned() -> dict[str, Any]:
    """Two learned blocks and tuned scales."""
    block = BlockQuality(
        index=0,
        mode="rounding",
        kept="learned",
        loss_before=0.5,
        loss_after=0.4,
        texts={"handbook_evaluation": (0.6, 0.54)},
        seconds=2.25,
        steps=16,
        best_step=12,
        rollbacks=1,
    )
    texts = {"handbook_evaluation": (0.6, 0.6)}
    change = {"index": 1, "kept": "start", "loss_after": 0.5, "texts": texts, "gave_up": True}
    return {"blocks": (block, block.model_copy(update=change)), "tuning": tuning_quality(0.35)}


def test_every_learned_block_and_the_tuning_are_shown(tmp_path: Path) -> None:
    html, page = page_of(folder_with(tmp_path, **learned()))
    start = page.cells.index("learned") - 1
    assert page.cells[start : start + 9] == [
        *("0", "learned", "0.5", "0.4", "-20.0%", "-10.0%", "12 of 16", "1", "2.2")
    ]
    assert page.cells[start + 9 : start + 18] == [
        *("1", "start", "0.5", "0.5", "+0.0%", "+0.0%", "12 of 16, gave up", "1", "2.2")
    ]
    assert {"-10.6%", "-5.1%", "4.5"} <= set(page.cells)
    assert "change on handbook_evaluation" in html
    assert "tuned together and kept: best of 20 steps at 15" in html
    assert {"0.3", "0.25", "0.4", "0.35"} <= set(page.cells)
    assert "nothing was trained" not in html


def test_resumed_parameters_and_warnings_are_pointed_out(tmp_path: Path) -> None:
    report = learned() | {"resumed": True, "warnings": ("it <overfits>",)}
    html, _ = page_of(folder_with(tmp_path, **report))
    assert "nothing was trained" in html
    assert html.index("<li>it &lt;overfits&gt;</li>") < html.index("<h2>Quality</h2>")


def test_without_learning_there_is_no_section_on_it(tmp_path: Path) -> None:
    html, _ = page_of(folder_with(tmp_path))
    assert "<h2>Learning</h2>" not in html
    assert "<h2>Warnings</h2>" not in html
