"""The smallest configurations of every declared architecture that show what is particular to it."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from tiny import VOCABULARY

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.1,
}
GROUPED = {"num_key_value_heads": 2}
WINDOWED = GROUPED | {"head_dim": 16, "sliding_window": 8}
EXPERTS = GROUPED | {"head_dim": 16, "num_experts_per_tok": 2}
# model_type -> what differs from COMMON, quantized linears of a block
COVERED: dict[str, tuple[dict[str, Any], int]] = {
    "llama": (GROUPED, 7),
    "mistral": (WINDOWED, 7),
    "mixtral": (EXPERTS | {"num_local_experts": 4}, 4 + 3 * 4),
    "qwen2": (GROUPED, 7),
    "qwen3": (GROUPED | {"head_dim": 16}, 7),
    "qwen3_moe": (EXPERTS | {"num_experts": 4, "moe_intermediate_size": 48}, 4 + 3 * 4),
    "gemma2": (WINDOWED | {"query_pre_attn_scalar": 16}, 7),
    "gemma3_text": (WINDOWED | {"num_hidden_layers": 6}, 7),
    "phi3": (GROUPED, 4),
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 32, "init_std": 0.1}, 6),
    "falcon": ({"new_decoder_architecture": True, "num_kv_heads": 2}, 4),
    "bloom": ({}, 4),
    "gpt_neox": ({}, 4),
    "gpt2": ({"n_inner": 96}, 4),
    "stablelm": (GROUPED, 7),
    "starcoder2": (GROUPED, 6),
}


def tiny_config(model_type: str) -> Any:
    """transformers' configuration of one of `COVERED`."""
    changes, _ = COVERED[model_type]
    return AutoConfig.for_model(model_type, **(COMMON | changes))
