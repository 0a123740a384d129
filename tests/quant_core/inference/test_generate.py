"""Streamed text is what transformers generates, handed out in whole characters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.errors import InputError, ModelError
from bitmill.inference.generate import _pieces, stream
from bitmill.models.convert_gguf import convert_gguf
from gguf_files import write_gguf
from tiny import tiny_llama, tiny_opt
from weights import PackedModel, pack_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("generate")
    return pack_model(tiny_llama(folder / "source"), folder / "packed")


def test_greedy_text_is_that_of_transformers(packed: PackedModel) -> None:
    model, tokenizer = bitmill.load(packed.folder), bitmill.load_tokenizer(packed.folder)
    prompt = tokenizer("The mill", return_tensors="pt").input_ids
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 1}
    ids = model.generate(prompt, **options)[0, prompt.shape[1] :]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(stream(packed.folder, "The mill", max_new_tokens=16)) == expected
    assert len(expected) > 3


@pytest.mark.parametrize("form", ["safetensors", "gguf", "export"])
def test_models_that_are_not_packed_go_on_as_they_do(
    packed: PackedModel, tmp_path: Path, form: str
) -> None:
    options = {"max_new_tokens": 8}
    source = packed.folder.parent / "source"
    if form == "export":
        bitmill.export(packed.folder, "dequantized", out=tmp_path / "out", dtype="float32")
        found = stream(tmp_path / "out", "The mill", **options)
        expected = stream(packed.folder, "The mill", **options)
    elif form == "gguf":
        file = write_gguf(tmp_path / "model.gguf", source)
        convert_gguf(file, tmp_path / "converted")
        found = stream(tmp_path, "The mill", gguf=file.name, **options)
        expected = stream(tmp_path / "converted", "The mill", **options)
    else:
        found = stream(source, "The mill", **options)
        model = AutoModelForCausalLM.from_pretrained(source)
        tokenizer = bitmill.load_tokenizer(source)
        prompt = tokenizer("The mill", return_tensors="pt").input_ids
        ids = model.generate(prompt, **options, do_sample=False, pad_token_id=1)
        expected = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
    assert "".join(found) == "".join(expected)


def test_sampling_depends_on_the_seed_alone(packed: PackedModel) -> None:
    def text(seed: int) -> str:
        pieces = stream(packed.folder, "a", max_new_tokens=12, temperature=1.5, seed=seed)
        return "".join(pieces)

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"there is no folder nowhere, .*give the folder of a model"
    ):
        stream(tmp_path / "nowhere", "a")


def test_a_character_of_several_tokens_comes_in_one_piece(packed: PackedModel) -> None:
    tokenizer = bitmill.load_tokenizer(packed.folder)
    ids = tokenizer("aé𝄞b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 8
    assert list(_pieces(tokenizer, iter(ids))) == ["a", "é", "𝄞", "b"]
    cut = "".join(_pieces(tokenizer, iter(ids[:-2])))
    assert cut.startswith("aé")
    assert cut.endswith("\N{REPLACEMENT CHARACTER}")


def test_generation_ends_at_the_end_of_sequence_token(packed: PackedModel, tmp_path: Path) -> None:
    model = bitmill.load(packed.folder)
    tokenizer = bitmill.load_tokenizer(packed.folder)
    prompt = tokenizer("The mill", return_tensors="pt").input_ids
    with torch.inference_mode():
        first = int(model(prompt).logits[0, -1].argmax())
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in packed.folder.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "generation_config.json").unlink()
    (copy / "generation_config.json").write_text(f'{{"eos_token_id": [{first}]}}')
    assert list(stream(copy, "The mill", max_new_tokens=16)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "no tokens"),
        ({"prompt": "x", "temperature": -1.0}, "temperature is -1.0"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature is nan"),
        ({"prompt": "x", "max_new_tokens": -5}, "max_new_tokens is -5"),
        ({"prompt": "x", "chat": True}, "no chat template"),
    ],
)
def test_input_that_cannot_be_continued_is_refused(
    packed: PackedModel, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        stream(packed.folder, **options)


def test_the_least_temperature_takes_the_likeliest_token(packed: PackedModel) -> None:
    cold = "".join(stream(packed.folder, "The mill", max_new_tokens=8, temperature=1e-40))
    assert cold == "".join(stream(packed.folder, "The mill", max_new_tokens=8))


def test_no_more_tokens_than_a_table_of_positions_has_rows(tmp_path: Path) -> None:
    model = tiny_opt(tmp_path / "opt", max_position_embeddings=16)
    assert "".join(stream(model, "A mill", max_new_tokens=11))
    with pytest.raises(InputError, match="is 17; the model has 16 positions") as caught:
        stream(model, "A mill", max_new_tokens=12)
    assert caught.value.code == "length_exceeds_model"
    with pytest.raises(InputError, match="is 20; the model has 16 positions"):
        stream(model, "A mill in summer, by", max_new_tokens=0)
