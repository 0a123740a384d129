"""`bitmill report` on a folder: learned blocks, tuning and warnings as text."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from bitmill.results import BlockQuality, QualityReport
from bitmill_service.cli.main import app
from learned_reports import tuning_quality


def block(index: int, after: float, other: float) -> BlockQuality:
    return BlockQuality(
        index=index,
        mode="rounding",
        kept="learned" if after < 0.5 else "start",
        loss_before=0.5,
        loss_after=after,
        texts={"handbook_evaluation": (1.0, other)},
        seconds=2.5,
        steps=16,
        best_step=12,
    )


def printed(folder: Path, report: QualityReport) -> list[str]:
    """Lines with single spaces."""
    (folder / "quality.json").write_text(report.to_json())
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    return [" ".join(line.split()) for line in result.output.splitlines()]


def test_learned_blocks_tuning_and_warnings_are_printed(tmp_path: Path) -> None:
    report = QualityReport(
        rows=(),
        blocks=(block(0, 0.4, 1.1), block(1, 0.5, 1.0)),
        tuning=tuning_quality(0.42),
        resumed=True,
        warnings=("it overfits",),
    )
    assert printed(tmp_path, report)[1:] == [
        "block kept error before after change handbook best of steps seconds",
        "0 learned 0.5 0.4 -20.0% +10.0% 12 of 16 2.5",
        "1 start 0.5 0.5 +0.0% +0.0% 12 of 16 2.5",
        "learned by an earlier job; nothing was trained",
        "learned 1 of 2 blocks in 5.0 s; mean change of block errors: "
        "held-out -10.6%, handbook_evaluation +4.9%",
        "tuned all scales in 7.0 s, kept; KL: held-out 0.3 to 0.25, "
        "handbook_evaluation 0.4 to 0.42",
        "warning: it overfits",
    ]


def test_nothing_is_said_of_learning_where_there_was_none(tmp_path: Path) -> None:
    assert len(printed(tmp_path, QualityReport(rows=()))) == 1
