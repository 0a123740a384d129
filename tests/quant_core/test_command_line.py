"""`python -m bitmill`: how refusals look and which exit codes they have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitmill import cli as command_line


def test_refusal_is_json_where_json_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", str(tmp_path / "none"), "--bits", "3", "--out", str(tmp_path / "out")]
    assert command_line.main([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(err.splitlines()[-1])["error"]
    assert (out, error["code"], error["param"]) == ("", "model_not_found", "model")
    assert command_line.main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {error['message']}"


def test_interrupt_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "_bench", interrupted)
    assert command_line.main(["bench", "folder"]) == 130
    assert "Traceback" not in capsys.readouterr().err
