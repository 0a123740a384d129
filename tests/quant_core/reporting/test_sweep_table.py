"""What a sweep found, as table and picture."""

from __future__ import annotations

import csv
import io
import json
from xml.etree import ElementTree

from bitmill.reporting.sweep_table import SweepRow, SweepTable
from bitmill.results import QualityRow, TextQuality


def row(cell: int, method: str, bits: float, size: int, perplexity: float) -> SweepRow:
    text = TextQuality(windows=2, tokens=100, perplexity=perplexity, perplexity_se=0.1, kl=0.25)
    quality = QualityRow(method=method, bits=bits, size=size, texts={"wiki": text})
    axes = {"allocation.method": method, "budget.bits": f"{bits:g}"}
    return SweepRow(cell, axes, "succeeded", f"job-{cell}", quality, 2.5, 4.0)


TABLE = SweepTable(
    [
        row(1, "sba", 3, 2_000_000, 24.5),
        SweepRow(
            2, {"allocation.method": "a|b\nc", "budget.bits": "9"}, "failed", error="too, big"
        ),
        row(3, "knapsack", 4, 3_000_000, 20.25),
    ]
)


def test_csv_has_every_cell_and_leaves_out_columns_without_values() -> None:
    rows = list(csv.DictReader(io.StringIO(TABLE.to_csv())))
    assert [r["state"] for r in rows] == ["succeeded", "failed", "succeeded"]
    assert rows[0]["perplexity wiki"] == "24.5"
    assert rows[1]["perplexity wiki"] == ""
    assert rows[1]["error"] == "too, big"
    assert "code_bits" not in rows[0]


def test_json_keeps_numbers() -> None:
    first, second, _ = json.loads(TABLE.to_json())
    assert (first["cell"], first["size"], first["KL wiki"]) == (1, 2_000_000, 0.25)
    assert second["size" if "size" in second else "error"] == "too, big"


def test_markdown_is_one_line_a_cell_whatever_a_value_holds() -> None:
    lines = TABLE.to_markdown().splitlines()
    assert len(lines) == 5
    assert "a\\|b c" in lines[3]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_plot_is_xml_with_a_line_for_every_setting_that_is_no_budget() -> None:
    picture = TABLE.to_svg()
    assert picture is not None
    root = ElementTree.fromstring(picture)
    names = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"sba", "knapsack", "checkpoint, MB", "perplexity, wiki"} <= set(names)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 2


def test_no_plot_before_a_cell_has_succeeded() -> None:
    assert SweepTable([SweepRow(1, {"seed": "0"}, "queued")]).to_svg() is None
    assert SweepTable([]).to_csv() == "\n"
