"""Texts are read as what they are, or refused by name; tokens without a row are never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitmill.calibration.texts import read_text
from bitmill.calibration.windows import check_token_ids, token_windows
from bitmill.config.quantization import FileText
from bitmill.errors import CalibrationError
from tiny import byte_tokenizer

TEXTS = ["first text", "second\nof two lines", "ünïcode"]
JOINED = "\n\n".join(TEXTS)
RECORDS = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, RECORDS))


def read(path: Path, **source: Any) -> str:
    return read_text(FileText.model_validate({"source": "file", "path": str(path)} | source), 0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", JOINED),
        ("no-suffix", JOINED),
        ("a.jsonl", LINES),
        ("a.JSONL", LINES + "\n"),
        ("a.ndjson", "\n" + LINES),
        ("a.json", json.dumps(RECORDS)),
        ("a.Json", json.dumps(RECORDS, indent=2)),
        ("a.json", json.dumps(TEXTS)),
    ],
)
def test_one_text_in_every_form_reads_alike(
    name: str, content: str, encoding: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding=encoding)
    assert read(tmp_path / name) == JOINED


def test_a_line_of_json_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"
    line = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(line + "\n", encoding="utf-8")
    assert read(tmp_path / "a.jsonl") == text


@pytest.mark.parametrize(
    ("name", "content", "suffix"),
    [
        ("a.txt", json.dumps(RECORDS), r"\.json,"),
        ("a.text", "  \n" + json.dumps(TEXTS), r"\.json,"),
        ("a.md", json.dumps(RECORDS[0]), r"\.json,"),
        ("a.txt", LINES, r"\.jsonl,"),
        ("corpus", "\ufeff" + LINES, r"\.jsonl,"),
    ],
)
def test_json_under_another_name_is_refused(
    name: str, content: str, suffix: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CalibrationError, match=f"ends in {suffix}") as caught:
        read(tmp_path / name)
    assert caught.value.code == "text_is_json"


@pytest.mark.parametrize("content", ["[1] A footnote.\nText.", "{braces} in prose", "[a]\n[b]"])
def test_prose_may_begin_with_a_bracket(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(content)
    assert read(tmp_path / "a.txt") == content


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", "{}", "holds no JSON array"),
        ("a.json", "[", "no JSON"),
        ("a.json", '[{"text": "x"}, 5]', "record 2"),
        ("a.json", '[{"other": "x"}]', "record 1"),
        ("a.json", '[{"text": ["x"]}]', "is a list"),
        ("a.jsonl", '["x"]', "record 1"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', "record 2.*surrogate"),
        ("a.json", '["\\udfff"]', "record 1.*surrogate"),
        ("a.jsonl", "[" * 100_000, "line 1"),
    ],
)
def test_records_without_the_field_are_named(
    name: str, content: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=problem) as caught:
        read(tmp_path / name)
    assert caught.value.param == "calibration.text.field"


@pytest.mark.parametrize("rows", [3, 40, 255])
def test_a_token_without_a_row_is_named_with_its_id(rows: int) -> None:
    tokenizer = byte_tokenizer()
    text = "hello world " * 4
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if max(ids) < rows:
        assert token_windows(text, tokenizer, 8, rows=rows).max() < rows
        return
    with pytest.raises(CalibrationError, match=f"has the id {max(ids)}") as caught:
        token_windows(text, tokenizer, 8, rows=rows, param="calibration.text")
    assert caught.value.code == "token_beyond_embedding"
    assert caught.value.param == "calibration.text"
    assert repr(tokenizer.convert_ids_to_tokens(max(ids))) in caught.value.message


def test_ids_up_to_the_last_row_pass() -> None:
    tokenizer = byte_tokenizer()
    check_token_ids([0, 5, 9], tokenizer, 10, "prompt")
    check_token_ids([], tokenizer, 10, "prompt")
    check_token_ids([10**6], tokenizer, None, "prompt")
    with pytest.raises(CalibrationError):
        check_token_ids([0, 5, 10], tokenizer, 10, "prompt")
