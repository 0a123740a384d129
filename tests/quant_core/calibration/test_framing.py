"""Windows that begin as the tokenizer begins a text, bare ones, and conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitmill.calibration.framing import TURN_CHARACTERS, beginning, described, framed
from bitmill.calibration.windows import calibration_tokens, evaluation_tokens, token_windows
from bitmill.config.quantization import Calibration
from bitmill.errors import CalibrationError
from tiny import byte_tokenizer

TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
    "[{{ m.role[0] }}]{{ m.content }}\n{% endfor %}"
)


def chatty(template: str = TEMPLATE) -> Any:
    tokenizer = byte_tokenizer(begins=True)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(("begins", "first"), [(True, [0]), (False, [])])
def test_a_window_begins_as_the_tokenizer_begins_a_text(begins: bool, first: list[int]) -> None:
    tokenizer = byte_tokenizer(begins=begins)
    text = "abcdefghijkl"
    assert beginning(tokenizer) == first
    windows = framed(text, tokenizer, 5, "tokenizer")
    own = 5 - len(first)
    assert windows == [
        first + tokenizer(text[i : i + own], add_special_tokens=False)["input_ids"]
        for i in range(0, len(text) - own + 1, own)
    ]
    assert framed(text, tokenizer, 5, "none") == framed(text, byte_tokenizer(), 5, "tokenizer")
    assert framed("abcd"[: own - 1], tokenizer, 5, "tokenizer") == []


def test_reports_name_the_tokens() -> None:
    assert described(byte_tokenizer(begins=True), "tokenizer") == "<s>"
    assert described(byte_tokenizer(begins=True), "none") == "nothing"
    assert described(byte_tokenizer(), "tokenizer") == "nothing"
    assert described(chatty(), "chat") == "chat template"


def test_a_conversation_has_the_texts_paragraphs_as_turns() -> None:
    text = "how?\n\nso.\n \nand then?\n\nthat.\n\nwhy\n\nbecause\n\nlast"
    tokenizer = chatty()
    decoded = [tokenizer.decode(ids) for ids in framed(text, tokenizer, 20, "chat")]
    assert decoded[0] == "<s>[u]how?\n[a]so.\n[u]and then?\n[a]that.\n"[: 20 + 2]
    assert decoded[1].startswith("<s>[u]why\n[a]because\n")
    assert all(len(ids) == 20 for ids in framed(text, tokenizer, 20, "chat"))


def test_a_long_paragraph_is_divided_and_nothing_is_lost() -> None:
    text = "word " * TURN_CHARACTERS
    tokenizer = chatty()
    whole = framed(text, tokenizer, 9000, "chat")
    (window,) = whole
    said = tokenizer.decode(window).replace("[u]", "").replace("[a]", " ").split()
    assert set(said[1:-1]) <= {"word"}
    assert len(said) > 1700


def test_a_template_that_is_missing_or_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as missing:
        framed("a\n\nb", byte_tokenizer(), 2, "chat")
    assert missing.value.code == "no_chat_template"
    with pytest.raises(CalibrationError, match="refuses") as refused:
        framed("a\n\nb", chatty("{{ raise_exception('never') }}"), 2, "chat")
    assert refused.value.code == "bad_chat_template"


def test_calibration_and_evaluation_are_framed_as_asked(tmp_path: Path) -> None:
    tokenizer = chatty()
    tokenizer.save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("abcdefghij" * 3 for _ in range(40)))
    for framing in ("tokenizer", "none", "chat"):
        asked = Calibration.model_validate(
            {
                "text": {"source": "file", "path": str(text)},
                "sequences": 3,
                "held_out": 1,
                "length": 16,
                "framing": framing,
            }
        )
        found = calibration_tokens(asked, tmp_path)
        assert found.framing == framing
        every = token_windows(text.read_text(), tokenizer, 16, framing=framing).tolist()
        assert all(row in every for row in found.tokens.tolist())
        evaluated = evaluation_tokens(
            "wiki_evaluation", tmp_path, length=16, sequences=2, framing=framing
        )
        begun = torch.cat([found.tokens, evaluated])[:, 0] == 0
        assert bool(begun.all()) == (framing != "none")
        assert bool(begun.any()) == (framing != "none")
