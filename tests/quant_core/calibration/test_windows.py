"""Token windows: the protocol, its errors, and every kind of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmill.calibration.texts import BLENDED
from bitmill.calibration.windows import (
    CalibrationSet,
    bundled_text,
    calibration_tokens,
    evaluation_tokens,
    token_windows,
)
from bitmill.config.quantization import Calibration
from bitmill.errors import CalibrationError, ModelError
from bitmill.models.tokenizer import load_tokenizer, shared_tokenizer
from tiny import byte_tokenizer

LENGTH = 600
"""Of all windows of bundled texts that are held against each other: their tokens are kept."""


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def every_window(tokenizer_folder: Path) -> dict[str, list[list[int]]]:
    """All windows of both calibration texts."""
    tokenizer = load_tokenizer(tokenizer_folder)
    return {name: token_windows(bundled_text(name), tokenizer, LENGTH).tolist() for name in BLENDED}


def calibration(path: Path, **changes: Any) -> Calibration:
    settings = {"sequences": 3, "held_out": 2, "length": 10}
    text = {"source": "file", "path": str(path)} | changes.pop("text", {})
    return Calibration.model_validate({"text": text} | settings | changes)


def write_text(folder: Path, count: int) -> tuple[Path, str]:
    """A text of `count` one-byte tokens."""
    text = "".join(chr(33 + i % 90) for i in range(count))
    path = folder / "text.txt"
    path.write_text(text)
    return path, text


def test_windows_are_consecutive_and_the_remainder_is_dropped(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    text = "abcdefghijk"
    windows = token_windows(text, tokenizer, 4)
    assert windows.shape == (2, 4)
    assert windows.flatten().tolist() == tokenizer(text)["input_ids"][:8]
    assert 0 not in windows


def test_calibration_is_a_seeded_choice_and_held_out_follows_it(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    path, text = write_text(tmp_path, 129)
    windows = token_windows(text, load_tokenizer(tokenizer_folder), 10)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(7))
    chosen = calibration_tokens(calibration(path), tokenizer_folder, seed=7)
    assert torch.equal(chosen.tokens, windows[order[:3]])
    assert torch.equal(chosen.held_out, windows[order[3:5]])


def test_digest_tells_token_sets_apart(tokenizer_folder: Path, tmp_path: Path) -> None:
    path, _ = write_text(tmp_path, 129)
    first = calibration_tokens(calibration(path), tokenizer_folder, seed=0)
    again = calibration_tokens(calibration(path), tokenizer_folder, seed=0)
    other = calibration_tokens(calibration(path), tokenizer_folder, seed=1)
    moved = calibration_tokens(calibration(path, sequences=4, held_out=1), tokenizer_folder, seed=0)
    assert first.digest == again.digest
    assert len({first.digest, other.digest, moved.digest}) == 3


def test_text_shorter_than_one_sequence_names_both_counts(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    path, _ = write_text(tmp_path, 9)
    with pytest.raises(CalibrationError, match="9 tokens, one sequence needs 10") as caught:
        calibration_tokens(calibration(path), tokenizer_folder)
    assert caught.value.code == "text_too_short"


def test_too_few_sequences_name_all_counts(tokenizer_folder: Path, tmp_path: Path) -> None:
    path, _ = write_text(tmp_path, 49)
    with pytest.raises(CalibrationError, match=r"4 sequences of 10 tokens, 3 .* 2 held out"):
        calibration_tokens(calibration(path), tokenizer_folder)


def test_a_text_that_is_too_short_is_named_by_the_field_that_it_is_of(
    tokenizer_folder: Path,
) -> None:
    asked = {"held_out_text": "mixture_calibration", "held_out": 4096, "length": LENGTH}
    one = Calibration.model_validate({"sequences": 1, **asked})
    with pytest.raises(CalibrationError, match="0 for calibration and 2048 held out") as caught:
        calibration_tokens(one, tokenizer_folder)
    assert caught.value.param == "calibration.held_out"
    with pytest.raises(CalibrationError, match=r"smaller evaluation\.length") as caught:
        evaluation_tokens("wiki_evaluation", tokenizer_folder, length=1 << 20)
    assert caught.value.param == "evaluation.length"


def test_json_lines_are_joined_by_empty_lines(tokenizer_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"body": part}) for part in ("abc", "de")) + "\n\n")
    settings = calibration(path, text={"field": "body"}, sequences=1, held_out=0, length=8)
    with pytest.raises(CalibrationError, match="7 tokens, one sequence needs 8"):
        calibration_tokens(settings, tokenizer_folder)
    settings = calibration(path, text={"field": "body"}, sequences=1, held_out=0)
    fitting = settings.model_copy(update={"length": 7})
    tokens = calibration_tokens(fitting, tokenizer_folder).tokens
    assert load_tokenizer(tokenizer_folder).decode(tokens[0]) == "abc\n\nde"


@pytest.mark.parametrize(
    ("line", "problem"),
    [("not json", "line 2"), ('{"other": 1}', "line or record 2"), ('{"text": 5}', "is a int")],
)
def test_bad_json_line_is_named(
    tokenizer_folder: Path, tmp_path: Path, line: str, problem: str
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match=problem):
        calibration_tokens(calibration(path), tokenizer_folder)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00bad"], ids=["missing", "not utf-8"])
def test_unreadable_text_is_named(
    tokenizer_folder: Path, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"corpus\.txt cannot be read"):
        calibration_tokens(calibration(path), tokenizer_folder)


def test_data_set_without_the_library_says_what_to_install(tokenizer_folder: Path) -> None:
    settings = Calibration.model_validate({"text": {"source": "dataset", "name": "some/corpus"}})
    with pytest.raises(CalibrationError, match="pip install datasets"):
        calibration_tokens(settings, tokenizer_folder)


def test_a_missing_tokenizer_is_the_models_fault(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be loaded") as refused:
        load_tokenizer(tmp_path)
    assert refused.value.code == "bad_tokenizer"
    assert str(tmp_path) not in refused.value.message


def test_bundled_texts_are_whole_and_evaluation_keeps_their_order(tokenizer_folder: Path) -> None:
    names = ("wiki_calibration", "mixture_calibration", "wiki_evaluation", "handbook_evaluation")
    sizes = {name: len(bundled_text(name).encode()) for name in names}
    assert sizes == {
        "wiki_calibration": 2049009,
        "mixture_calibration": 1213233,
        "wiki_evaluation": 329534,
        "handbook_evaluation": 331222,
    }
    tokens = evaluation_tokens("wiki_evaluation", tokenizer_folder, length=64, sequences=3)
    tokenizer = load_tokenizer(tokenizer_folder)
    start = tokenizer(bundled_text("wiki_evaluation")[:400], add_special_tokens=False)["input_ids"]
    assert tokens.flatten().tolist() == start[: 3 * 64]


def test_a_kept_text_is_held_against_each_model(tokenizer_folder: Path) -> None:
    evaluation_tokens("wiki_evaluation", tokenizer_folder, length=64, rows=258)
    with pytest.raises(CalibrationError, match="the model's embedding has 99 rows") as caught:
        evaluation_tokens("wiki_evaluation", tokenizer_folder, length=64, rows=99)
    assert (caught.value.code, caught.value.param) == ("token_beyond_embedding", "evaluation")


def test_half_of_the_held_out_windows_may_be_of_another_text(
    tokenizer_folder: Path, every_window: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    path, _ = write_text(tmp_path, 12 * LENGTH + 9)
    asked = calibration(path, length=LENGTH, held_out=3)
    plain = calibration_tokens(asked, tokenizer_folder)
    changes = {"held_out": 5, "held_out_text": "mixture_calibration"}
    asked = calibration(path, length=LENGTH, **changes)
    found = calibration_tokens(asked, tokenizer_folder)
    assert torch.equal(found.tokens, plain.tokens)
    assert torch.equal(found.held_out[:3], plain.held_out)
    mixture = every_window["mixture_calibration"]
    assert len(found.held_out) == 5
    assert all(window in mixture for window in found.held_out[3:].tolist())
    assert found.digest != plain.digest


def test_a_blend_takes_windows_of_both_texts_in_turn(tokenizer_folder: Path) -> None:
    def windows(name: str, **asked: int) -> CalibrationSet:
        text = {"source": "bundled", "name": name}
        one = Calibration.model_validate({"text": text, "length": LENGTH, **asked})
        return calibration_tokens(one, tokenizer_folder)

    blend = windows("blend_calibration", sequences=5, held_out=3)
    wiki = windows("wiki_calibration", sequences=3, held_out=2)
    mixture = windows("mixture_calibration", sequences=2, held_out=1)
    assert blend.tokens[::2].equal(wiki.tokens)
    assert blend.tokens[1::2].equal(mixture.tokens)
    assert blend.held_out.equal(torch.cat([wiki.held_out, mixture.held_out]))
    one = windows("blend_calibration", sequences=1, held_out=0)
    assert one.tokens.equal(wiki.tokens[:1])
    assert not len(one.held_out)


@pytest.mark.parametrize("text", ["wiki_calibration", "mixture_calibration", "blend_calibration"])
@pytest.mark.parametrize("judge", ["wiki_calibration", "mixture_calibration"])
def test_windows_held_out_of_a_text_are_none_of_its_calibration_windows(
    tokenizer_folder: Path, every_window: dict[str, list[list[int]]], text: str, judge: str
) -> None:
    source = {"source": "bundled", "name": text}
    asked = Calibration.model_validate(
        {"text": source, "length": LENGTH, "sequences": 9, "held_out": 8, "held_out_text": judge}
    )
    found = calibration_tokens(asked, tokenizer_folder)
    every = [tuple(window) for window in torch.cat([found.tokens, found.held_out]).tolist()]
    assert len(every) == len(set(every)) == 17
    assert all(window in every_window[judge] for window in found.held_out[-4:].tolist())


def test_a_tokenizer_and_its_windows_are_kept_while_its_files_are(tmp_path: Path) -> None:
    for name in ("one", "two"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    first = shared_tokenizer(tmp_path / "one")
    assert shared_tokenizer(tmp_path / "two") is first

    def tokens() -> torch.Tensor:
        return evaluation_tokens("wiki_evaluation", tmp_path / "two", length=8, sequences=1)

    plain = tokens()
    tokens().zero_()  # of a caller who changes his
    assert tokens().equal(plain)
    byte_tokenizer(begins=True).save_pretrained(tmp_path / "two")
    assert shared_tokenizer(tmp_path / "two") is not first
    assert tokens().tolist() == [[0, *plain[0, :7].tolist()]]
