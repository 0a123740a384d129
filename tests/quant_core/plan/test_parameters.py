"""The torch-free tables of parameters, against the skeletons that transformers builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from bitmill.errors import ModelError
from bitmill.models.skeleton import build_skeleton, skeleton_parameters
from bitmill.plan.architectures import ARCHITECTURES
from bitmill.plan.parameters import MAX_PARAMETERS, Parameters
from tiny_architectures import COMMON, COVERED

SIZES = {"vocab_size": 258, "num_hidden_layers": 2}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 8},
        {"num_key_value_heads": None},
        {"tie_word_embeddings": True},
    ],
    "mistral": [{"head_dim": 24}, {"num_key_value_heads": 4}],
    "mixtral": [{"head_dim": 24}, {"num_local_experts": 2}],
    "qwen2": [{"head_dim": 24}, {"tie_word_embeddings": True}],
    "qwen3": [{"head_dim": 24}, {"attention_bias": True}],
    "qwen3_moe": [
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [0]},
        {"attention_bias": True},
        {"head_dim": 24},
    ],
    "gemma2": [{"attention_bias": True}, {"head_dim": 24}, {"tie_word_embeddings": False}],
    "gemma3_text": [{"attention_bias": True}, {"head_dim": 24}],
    "phi3": [{"head_dim": 24}, {"num_key_value_heads": None}],
    "opt": [
        {"word_embed_proj_dim": 64},
        {"word_embed_proj_dim": None},
        {"enable_bias": False},
        {"layer_norm_elementwise_affine": False},
        {"do_layer_norm_before": False},
        {"_remove_final_layer_norm": True},
    ],
    "falcon": [
        {"new_decoder_architecture": False},
        {"new_decoder_architecture": False, "multi_query": False},
        {"new_decoder_architecture": False, "parallel_attn": False},
        {"num_ln_in_parallel_attn": 1},
        {"ffn_hidden_size": 80},
        {"bias": True},
    ],
    "bloom": [{"n_embed": 128}, {"tie_word_embeddings": False}],
    "gpt_neox": [{"attention_bias": False}, {"tie_word_embeddings": True}],
    "gpt2": [{"n_inner": None}, {"n_inner": 80}],
    "stablelm": [{"qk_layernorm": True}, {"use_qkv_bias": True}, {"use_parallel_residual": True}],
    "starcoder2": [{"use_bias": False}, {"head_dim": 24}],
}
LARGE = {"opt": 768, "falcon": 568, "gpt2": 768, "starcoder2": 768}
"""Widths that the default number of heads divides, where it is not 512."""


def skeleton(model_type: str, config: dict[str, Any]) -> Parameters:
    return skeleton_parameters(build_skeleton({"model_type": model_type} | config, torch.float32))


def given(model_type: str, variant: dict[str, Any]) -> dict[str, Any]:
    changes, _ = COVERED[model_type]
    return COMMON | changes | variant


CASES = [(kind, variant) for kind in sorted(COVERED) for variant in ({}, *VARIANTS[kind])]


@pytest.mark.parametrize(("model_type", "variant"), CASES, ids=lambda v: str(v))
def test_table_equals_transformers_skeleton(model_type: str, variant: dict[str, Any]) -> None:
    config = given(model_type, variant)
    assert ARCHITECTURES[model_type].parameters(config) == skeleton(model_type, config)


@pytest.mark.parametrize("model_type", sorted(COVERED))
def test_absent_keys_mean_transformers_defaults(model_type: str) -> None:
    """Nothing but sizes given, and everything given that transformers writes."""
    config = SIZES | {"hidden_size": LARGE.get(model_type, 512), "pad_token_id": None}
    expected = skeleton(model_type, config)
    found = ARCHITECTURES[model_type]
    assert found.parameters(config) == expected
    written = AutoConfig.for_model(model_type, **config).to_dict()
    assert found.parameters(written) == expected


def test_a_tied_pair_is_found_under_either_name() -> None:
    tied = ARCHITECTURES["llama"].parameters(given("llama", {"tie_word_embeddings": True}))
    names = set(tied.shapes)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    assert tied.missing(names) == tied.missing(names - {head}) == []
    assert tied.missing(names - {embedding}) == []
    assert tied.missing(names - {head, embedding}) == [embedding, head]
    untied = ARCHITECTURES["llama"].parameters(given("llama", {"tie_word_embeddings": False}))
    assert untied.missing(names - {head}) == [head]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"num_key_value_heads": "many"}, "num_key_value_heads"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"decoder_sparse_step": 1.5}, "decoder_sparse_step"),
        ({"mlp_only_layers": 3}, "mlp_only_layers"),
        ({"head_dim": True}, "head_dim"),
        ({"num_experts": 4096, "num_hidden_layers": 512}, "num_hidden_layers"),
    ],
)
def test_absurd_settings_are_refused_by_name(changes: dict[str, Any], param: str) -> None:
    with pytest.raises(ModelError, match=param if param != "num_hidden_layers" else "more than"):
        ARCHITECTURES["qwen3_moe"].parameters(given("qwen3_moe", changes))
    assert MAX_PARAMETERS < 4096 * 512
