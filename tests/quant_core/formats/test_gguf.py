"""Export `gguf`: transformers' own loader and the package gguf read the packed weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitmill.errors import FormatError, SpecError
from bitmill.formats.gguf.format import Gguf
from bitmill.models.convert_gguf import convert_gguf
from bitmill.pipeline.export import Export
from tiny import save_tiny
from tiny_architectures import tiny_config
from weights import PackedModel, dequantized_model, pack_model

TOKENS = torch.arange(3, 35)[None]
WRITTEN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
SIZES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 128},
    "gemma3_text": {"query_pre_attn_scalar": 16},
}
"""What transformers' loader of GGUF files takes for granted, and llama.cpp."""
LOADABLE = {"gemma3_text": {"sliding_window": 512, "head_dim": 256, "query_pre_attn_scalar": 256}}
"""What transformers' loader drops beyond that."""


def packed_model(folder: Path, kind: str, cycle: tuple[int, ...], **changes: Any) -> PackedModel:
    config = tiny_config(kind)
    for name, value in (SIZES.get(kind, {}) | changes).items():
        setattr(config, name, value)
    source = save_tiny(folder / "source", config)
    file = source / "tokenizer.json"
    settings = json.loads(file.read_text())
    vocabulary = settings["model"]["vocab"]
    for place, merged in ((256, "ab"), (257, "cd")):
        vocabulary.pop(next(text for text, found in vocabulary.items() if found == place))
        vocabulary[merged] = place
    settings["model"]["merges"] = [["a", "b"], ["c", "d"]]
    file.write_text(json.dumps(settings))
    return pack_model(source, folder / "packed", cycle=cycle)


def exported(packed: Path, out: Path, **settings: Any) -> Path:
    Export.of(packed, Gguf(**settings)).write(out, lambda *_: None)
    return out


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_is_read_again_computes_the_same(kind: str, tmp_path: Path) -> None:
    packed = packed_model(tmp_path, kind, (3, 4, 1, 0, 6, 2, 7 - 1))
    out = exported(packed.folder, tmp_path / "out")
    convert_gguf(out / "model.gguf", tmp_path / "again")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        found, same = model(TOKENS).logits, dequantized_model(packed)(TOKENS).logits
    torch.testing.assert_close(found, same, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_transformers_own_loader_computes_the_same(kind: str, tmp_path: Path) -> None:
    packed = packed_model(tmp_path, kind, (3, 4, 5), **LOADABLE.get(kind, {}))
    out = exported(packed.folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        found, same = model(TOKENS).logits, dequantized_model(packed)(TOKENS).logits
    torch.testing.assert_close(found, same, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_scaled_positions_reach_transformers_by_a_config_alone(kind: str, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}
    packed = packed_model(tmp_path, kind, (3, 4, 5), rope_parameters=rope)
    out = exported(packed.folder, tmp_path / "out")
    same = dequantized_model(packed)
    away = []
    for given in ({}, {"config": same.config}):
        model = AutoModelForCausalLM.from_pretrained(
            out, gguf_file="model.gguf", dtype=torch.float32, **given
        )
        with torch.no_grad():
            away.append(float((model(TOKENS).logits - same(TOKENS).logits).abs().max()))
    assert away[0] > 1e-3, "transformers reads rope.scaling now: docs/exports.md says it does not"
    assert away[1] < 1e-5


def test_types_follow_widths_and_sizes_are_said_before(tmp_path: Path) -> None:
    packed = packed_model(tmp_path, "llama", (3, 4, 6, 2, 1))
    export = Export.of(packed.folder, Gguf())
    said = export.report()
    assert export.write(tmp_path / "out", lambda *_: None) == said
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    first = min(tensor.data_offset for tensor in reader.tensors)
    assert said.file_bytes == (tmp_path / "out" / "model.gguf").stat().st_size - first
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    asked = {"attn_q": (3,), "attn_k": (4,), "attn_v": (6,), "attn_output": (2,), "ffn_gate": (1,)}
    types = {1: "Q5_0", 2: "Q4_0", 3: "Q4_0", 4: "Q5_0", 6: "Q8_0"}
    widths = {name.rpartition(".")[2]: w.widths for name, w in list(packed.weights.items())[:5]}
    for stored, part in zip(
        asked, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"), strict=True
    ):
        assert kinds[f"blk.0.{stored}.weight"] == types[max(widths[part])]
    assert kinds["output_norm.weight"] == "F32"


def test_the_tokenizer_travels(tmp_path: Path) -> None:
    packed = packed_model(tmp_path, "qwen2", (4,))
    out = exported(packed.folder, tmp_path / "out", pretokenizer="smollm")
    read = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    own = AutoTokenizer.from_pretrained(packed.folder)
    assert read("abcd abba").input_ids == own("abcd abba").input_ids
    fields = gguf.GGUFReader(out / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"


@pytest.mark.parametrize(
    ("kind", "cycle", "changes", "problem"),
    [
        ("llama", (4, 8), {}, "groups of [8] bits fit none"),
        ("gpt2", (4,), {}, "gpt2: models of this type are not written"),
        ("llama", (4,), {"intermediate_size": 80}, "80 columns are no blocks of 32"),
        ("llama", (4,), {"hidden_act": "gelu"}, "config.json: hidden_act 'gelu' cannot be said"),
        ("mistral", (4,), {"sliding_window": 8}, "sliding_window 8 is not applied by llama.cpp"),
        ("qwen2", (4,), {"use_sliding_window": True}, "use_sliding_window cannot be said"),
        (
            "llama",
            (4,),
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic' cannot be said",
        ),
        (
            "gemma3_text",
            (4,),
            {"query_pre_attn_scalar": 7},
            "query_pre_attn_scalar 7 would be read",
        ),
    ],
)
def test_what_a_file_cannot_say_is_refused_by_name(
    tmp_path: Path, kind: str, cycle: tuple[int, ...], changes: dict[str, Any], problem: str
) -> None:
    packed = packed_model(tmp_path, kind, cycle, **changes)
    with pytest.raises(SpecError, match=re.escape(problem)):
        exported(packed.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_llama_3_scaling_is_carried_over(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    packed = packed_model(tmp_path, "llama", (4,), rope_parameters=rope)
    out = exported(packed.folder, tmp_path / "out")
    convert_gguf(out / "model.gguf", tmp_path / "again")
    read = json.loads((tmp_path / "again" / "config.json").read_text())["rope_parameters"]
    assert read["rope_type"] == "llama3"
    assert read["factor"] == pytest.approx(8)


def test_a_tokenizer_of_another_kind_is_refused_or_left_out(tmp_path: Path) -> None:
    packed = packed_model(tmp_path, "llama", (4,))
    (packed.folder / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match="has no tokenizer"):
        exported(packed.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    exported(packed.folder, tmp_path / "out", tokenizer=False)
