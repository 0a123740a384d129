"""Matrices that are kept are stored in 16 bits where that is exact enough, and counted as such."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitmill
from bitmill.config.quantization import parse_config
from bitmill.evaluation.compare import evaluate_folder
from bitmill.io.safetensors import read_headers
from bitmill.pipeline.job import run_job
from bitmill.plan.model_plan import make_plan
from tiny import save_tiny, tiny_llama
from tiny_architectures import tiny_config

pytestmark = pytest.mark.e2e
TEXT = {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")}
ROWS = 6656
"""Of an embedding with 160 columns: just above a million values."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def asked(**allocation):
    return parse_config(
        {
            "budget": {"code_bits": 4},
            "allocation": {"method": "uniform", "order": "natural", **allocation},
            "refinement": {"method": "rtn"},
            "calibration": {"text": TEXT, "sequences": 2, "length": 32, "held_out": 0},
            "evaluation": {"texts": ["wiki_evaluation"], "sequences": 2, "length": 64},
            "threads": 1,
        }
    )


def dtypes(folder):
    return {name: info.dtype for name, info in read_headers(folder).items()}


def measured_again(folder, source):
    (_, row) = evaluate_folder(
        folder,
        source,
        gguf=None,
        texts=("wiki_evaluation",),
        sequences=2,
        length=64,
        device="cpu",
    )
    return row


def job(source, folder, **allocation):
    return run_job(asked(**allocation), source, folder / "work", folder / "out")


def test_float32_embeddings_and_heads_are_halved_and_vectors_stay(tmp_path):
    source = tiny_llama(tmp_path / "source", tie_word_embeddings=False, vocab_size=ROWS)
    made = job(source, tmp_path)
    found = dtypes(tmp_path / "out")
    assert (found[EMBEDDING], found[HEAD]) == ("F16", "F16")
    assert found["model.norm.weight"] == "F32"
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert made.quality.row("uniform rtn").size == on_disk
    model = bitmill.load(tmp_path / "out")
    stored = load_file(source / "model.safetensors")
    assert torch.equal(model.lm_head.weight, stored[HEAD].half().float())


def test_the_report_measures_the_rounding(tmp_path):
    source = tiny_llama(tmp_path / "source", vocab_size=ROWS)
    made = job(source, tmp_path)
    again = measured_again(tmp_path / "out", source)
    assert again.texts == made.quality.row("uniform rtn").texts
    whole = job(source, tmp_path / "whole", kept_dtype="source").quality.row("uniform rtn")
    assert whole.texts != again.texts
    assert whole.texts["wiki_evaluation"].kl == pytest.approx(
        again.texts["wiki_evaluation"].kl, rel=1e-3
    )


def test_all_stay_as_they_are_where_asked(tmp_path):
    source = tiny_llama(tmp_path / "source", vocab_size=ROWS)
    job(source, tmp_path, kept_dtype="source")
    assert dtypes(tmp_path / "out")[EMBEDDING] == "F32"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_stay_as_they_are(tmp_path, dtype):
    source = tiny_llama(tmp_path / "source", dtype=dtype, vocab_size=ROWS)
    job(source, tmp_path)
    assert dtypes(tmp_path / "out")[EMBEDDING] == {"float16": "F16", "bfloat16": "BF16"}[dtype]


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_values_beyond_float16_stay_as_they_are(tmp_path, factor):
    source = tiny_llama(tmp_path / "source", tie_word_embeddings=False, vocab_size=ROWS)
    stored = load_file(source / "model.safetensors")
    stored[EMBEDDING] *= factor
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    made = job(source, tmp_path)
    found = dtypes(tmp_path / "out")
    assert (found[EMBEDDING], found[HEAD]) == ("F32", "F16")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert made.quality.row("uniform rtn").size == on_disk


def test_large_linears_kept_whole_are_halved_and_what_weighs_little_is_not(tmp_path):
    source = tiny_llama(tmp_path / "source", intermediate_size=ROWS)
    job(source, tmp_path, keep=["*.down_proj", "*.v_proj"])
    found = dtypes(tmp_path / "out")
    assert found["model.layers.0.mlp.down_proj.weight"] == "F16"
    assert found["model.layers.0.self_attn.v_proj.weight"] == "F32"
    assert found[EMBEDDING] == "F32"
    again = measured_again(tmp_path / "out", source)
    assert again.texts["wiki_evaluation"].kl > 0


def test_transposed_linears_are_halved_and_small_ones_are_not(tmp_path):
    config = tiny_config("gpt2")
    config.n_embd, config.n_inner = 160, ROWS
    source = save_tiny(tmp_path / "source", config)
    job(source, tmp_path, keep=["*.mlp.c_proj"])
    assert dtypes(tmp_path / "out")["transformer.h.0.mlp.c_proj.weight"] == "F16"
    assert measured_again(tmp_path / "out", source).texts["wiki_evaluation"].kl > 0
    experts = make_plan(save_tiny(tmp_path / "experts", tiny_config("mixtral")), asked())
    assert not any(tensor.narrowed for tensor in experts.tensors)
