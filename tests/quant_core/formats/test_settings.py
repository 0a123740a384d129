"""What is said of settings that a format does not have or take."""

from __future__ import annotations

from typing import Any

import pytest

from bitmill.errors import SpecError
from bitmill.formats.export_plan import ExportTarget
from bitmill.formats.format import FORMATS, parse_format


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("gguf", {"dtype": "q4"}, "format 'gguf' has no setting 'dtype', given as 'q4': it has "),
        ("exl2", {"bits": 4}, "format 'exl2' takes no settings, but bits = 4 is given: leave it"),
        ("gptq", {"symetric": True}, "no setting 'symetric', given as True: it has symmetric"),
        ("gptq", {"version": "2"}, "'version' of format 'gptq' cannot be '2': Input should be 1"),
        ("gptq", {"version": 2, "fused": [1]}, "setting 'fused' of format 'gptq' cannot be [1]: "),
        ("w8a8", {"settings": {"dtype": "fp8"}}, "it has dtype (default 'int8')"),
        ("gptq", {"version": "2" * 999}, f"cannot be '{'2' * 99}: "),
    ],
)
def test_a_wrong_setting_is_told_with_its_value_and_those_there_are(
    name: str, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(SpecError) as refused:
        parse_format(name, settings)
    assert told in refused.value.message
    assert refused.value.param in settings
    for key in FORMATS[name].model_fields:
        assert f"{key} (default " in refused.value.message
    with pytest.raises(ValueError, match="format") as asked:
        ExportTarget(format=name, settings=settings)
    assert told in str(asked.value)


def test_right_settings_are_taken() -> None:
    assert parse_format("gptq", {"version": 1, "symmetric": True}).model_dump() == {
        "fused": True,
        "symmetric": True,
        "version": 1,
    }
    assert parse_format("exl2", {}) == FORMATS["exl2"]()
