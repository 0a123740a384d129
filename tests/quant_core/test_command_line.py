"""`python -m bitmill`: how refusals look and which exit codes they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitmill import cli as command_line
from bitmill.errors import InputError


def test_refusal_is_json_where_json_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", str(tmp_path / "none"), "--bits", "3", "--out", str(tmp_path / "out")]
    assert command_line.main([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(err.splitlines()[-1])["error"]
    assert (out, error["code"], error["param"]) == ("", "model_not_found", "model")
    assert command_line.main(arguments) == 2
    told = capsys.readouterr().err.splitlines()[-2:]
    assert told == [f"error: {error['message']}", f"  {error['hint']}"]


def test_a_job_specification_with_all_of_its_words_is_a_configuration(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "spec-v1.json"
    spec = json.loads(golden.read_text()) | {"model": {"source": "path", "path": "m", "file": None}}
    spec["refinement"]["omniquant"]["resume_parameters"] = {"source": "path", "path": "learned"}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    line = ["quantize", "--spec", str(tmp_path / "spec.json"), "--out", "out", "--seed", "5"]
    model, file, config = command_line.build_config(command_line.parser().parse_args(line))
    assert (model, file, config.seed, config.threads) == (Path("m"), None, 5, 2)
    assert config.allocation.map is not None
    assert config.allocation.map.linears == {"model.layers.0.mlp.up_proj": (3, 3, 4, 3, 2)}
    assert config.refinement.omniquant.resume_parameters == Path("learned")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"source": "hub", "repo_id": "a/b"}},
        {"allocation": {"method": "map", "map": {"source": "job", "job_id": "j"}}},
        {"refinement": {"omniquant": {"resume_parameters": {"source": "job", "job_id": "j"}}}},
    ],
)
def test_what_only_a_service_can_find_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = {"model": {"source": "path", "path": "m"}, "budget": {"bits": 3}} | changes
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    line = ["quantize", "--spec", str(tmp_path / "spec.json"), "--out", "out"]
    with pytest.raises(InputError):
        command_line.build_config(command_line.parser().parse_args(line))


def test_interrupt_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "_bench", interrupted)
    assert command_line.main(["bench", "folder"]) == 130
    assert "Traceback" not in capsys.readouterr().err
