"""The Python of docs/library.md and of the README, run as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import bitmill
from tiny import tiny_llama

ROOT = Path(__file__).parents[3]
QUICK: dict[str, Any] = {
    "calibration_sequences": 2,
    "calibration_length": 64,
    "held_out": 1,
    "evaluation_sequences": 1,
    "evaluation_length": 64,
}
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="runs in a source tree"),
]


@pytest.mark.slow
def test_the_library_page_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(tmp_path / "models" / "SmolLM2-135M", hidden_size=128, intermediate_size=192)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/library.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/library.md", "exec"), names)  # noqa: S102
    said = capsys.readouterr().out
    assert "impossible_budget" in said
    assert {path.name for path in tmp_path.iterdir()} == {
        "models", "packed", "natural", "learned", "profile", "refined", "sweep", "report.html",
        "watched", "plain",
    }  # fmt: skip
    assert names["result"].bits <= 3
    assert [result.folder.name for result in names["results"]] == [
        "bits-2.5", "code_bits-3",
    ]  # fmt: skip


def test_the_readme_runs_with_a_shorter_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(
        tmp_path / "path" / "to" / "model",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
    )
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"From Python:\n\n((?:    .*\n)+)", page)
    code = re.sub(r"^    ", "", block, flags=re.M)
    assert 'out="packed")' in code
    code = code.replace('out="packed")', 'out="packed", **QUICK)')
    names: dict[str, Any] = {"QUICK": QUICK}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    assert isinstance(names["result"], bitmill.Result)
    assert names["model"].config.hidden_size == 64
