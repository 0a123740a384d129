"""Tokenizers of GGUF files give their own words back, and begin and end texts as the header says,
whatever the installed transformers makes of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import pytest
from transformers import AutoConfig

from bitmill.errors import ModelError
from bitmill.models.convert_gguf import convert_gguf
from bitmill.models.tokenizer import load_tokenizer
from gguf_files import write_bytes, write_gguf, write_pieces
from tiny import save_tiny
from tiny_architectures import COMMON, COVERED

Header = Callable[[gguf.GGUFWriter], None]

WORDS = ["th", "\u2581th", "\u2581the", "mi", "\u2581mi", "\u2581mil", "\u2581mill"]
"""Every one made of two that come before."""


def pieces(writer: gguf.GGUFWriter) -> None:
    write_pieces(writer, WORDS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        kind: save_tiny(folder / kind, AutoConfig.for_model(kind, **(COMMON | COVERED[kind][0])))
        for kind in ("llama", "gemma3_text", "gpt2")
    }


def flags(begin: bool | None, end: bool | None, pre: str | None = None) -> Header:
    def add(writer: gguf.GGUFWriter) -> None:
        if begin is not None:
            writer.add_add_bos_token(begin)
        if end is not None:
            writer.add_add_eos_token(end)
        if pre is not None:
            writer.add_tokenizer_pre(pre)

    return add


CASES = {
    "SentencePiece begins where the header is silent": ("llama", pieces, flags(None, None), 1, 0),
    "it is told not to": ("llama", pieces, flags(False, None), 0, 0),
    "it is told to end": ("llama", pieces, flags(None, True), 1, 1),
    "Gemma begins": ("gemma3_text", pieces, flags(True, False), 1, 0),
    "Gemma begins where the header is silent": ("gemma3_text", pieces, flags(None, None), 1, 0),
    "Gemma is told not to": ("gemma3_text", pieces, flags(False, False), 0, 0),
    "Gemma ends": ("gemma3_text", pieces, flags(False, True), 0, 1),
    "byte-level adds nothing": ("gpt2", write_bytes, flags(None, None), 0, 0),
    "byte-level is told to begin": ("gpt2", write_bytes, flags(True, None), 1, 0),
    "byte-level is told to end": ("gpt2", write_bytes, flags(None, True), 0, 1),
    "Llama 3 begins": ("llama", write_bytes, flags(None, None, "llama-bpe"), 1, 0),
    "Llama 3 is told not to": ("llama", write_bytes, flags(False, None, "llama-bpe"), 0, 0),
    "Qwen's do not begin": ("llama", write_bytes, flags(None, None, "qwen2"), 0, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_texts_begin_and_end_as_the_header_says(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    kind, tokenizer, header, begins, ends = CASES[name]
    path = write_gguf(tmp_path / "m.gguf", models[kind], header, tokenizer=tokenizer)
    convert_gguf(path, tmp_path / "out")
    found = load_tokenizer(tmp_path / "out")
    first, last = (1, 2) if tokenizer is pieces else (0, 1)
    plain = found("the mill", add_special_tokens=False)["input_ids"]
    assert found("the mill")["input_ids"] == [first] * begins + plain + [last] * ends
    assert (found.bos_token_id, found.eos_token_id) == (first, last)
    assert found.decode(plain).strip() == "the mill"
    if tokenizer is pieces:
        assert found.convert_ids_to_tokens(plain)[-1] == "\u2581mill"
        assert found("<turn>", add_special_tokens=False)["input_ids"] == [3]


def test_words_that_come_back_as_others_are_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """A word whose parts are no tokens, as where a release builds the wrong merges."""
    path = write_gguf(
        tmp_path / "m.gguf",
        models["llama"],
        tokenizer=partial(write_pieces, words=["\u2581the", "\u2581mill", "ab"]),
    )
    with pytest.raises(ModelError) as refused:
        convert_gguf(path, tmp_path / "out")
    error = refused.value
    assert (error.code, error.param) == ("gguf_tokenizer", "m.gguf")
    assert "2 of 3 words of its vocabulary come back as others" in error.message
    assert "'\u2581the' as ['" in error.message
    assert "transformers 5.18.0 or newer" in str(error.hint)
    assert not (tmp_path / "out").exists()


def test_byte_level_words_without_their_merges_are_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = partial(write_bytes, merges=["a b"])
    path = write_gguf(tmp_path / "m.gguf", models["gpt2"], tokenizer=tokenizer)
    with pytest.raises(ModelError, match=r"1 of 2 words .* 'cd' as \['Ċ', 'c', 'd'\]"):
        convert_gguf(path, tmp_path / "out")


@pytest.mark.parametrize("place", [258, 1 << 31])
def test_a_first_token_past_the_vocabulary_is_refused(
    place: int, models: dict[str, Path], tmp_path: Path
) -> None:
    def header(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0]["tokenizer.ggml.bos_token_id"].value = place

    path = write_gguf(tmp_path / "m.gguf", models["gpt2"], header)
    with pytest.raises(ModelError, match=f"bos_token_id is {place}, but it has 258 tokens"):
        convert_gguf(path, tmp_path / "out")


def test_a_tokenizer_that_fails_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """transformers takes a byte-level vocabulary for Gemma's, and fails over any text."""
    path = write_gguf(tmp_path / "m.gguf", models["gemma3_text"], tokenizer=write_bytes)
    with pytest.raises(ModelError, match=r"builds another tokenizer than m\.gguf") as refused:
        convert_gguf(path, tmp_path / "out")
    assert refused.value.code == "gguf_tokenizer"
