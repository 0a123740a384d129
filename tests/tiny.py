"""Tiny models made from a configuration and a seed, saved as Hugging Face folders.

Nothing is downloaded: the tokenizer is byte-level BPE without merges (256 bytes + 2 specials).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

VOCABULARY = 258
CALIBRATION = Path(__file__).parent / "quant_core" / "calibration.txt"
"""A text of 4,000 bytes; `byte_tokenizer` takes five seconds for the bundled one."""


def byte_tokenizer(*, begins: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, ids 2..257; 0 is <s>, 1 is </s>. begins: it puts <s> before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {byte: i + 2 for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_tiny(folder: Path, config: Any, *, seed: int = 0, dtype: str = "float32") -> Path:
    """Save a randomly initialized causal LM of this configuration, with a tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def put_nan(folder: Path) -> None:
    """Damage one weight of a `tiny_llama`."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})


def llama_config(**changes: Any) -> LlamaConfig:
    """2 blocks, hidden 160 (one full group and a tail of 32), intermediate 256, grouped queries."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 160,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 40,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.05,
    }
    return LlamaConfig(**(settings | changes))


def tiny_llama(folder: Path, *, seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """A two-block Llama with tied embeddings."""
    return save_tiny(folder, llama_config(**changes), seed=seed, dtype=dtype)


def tinier_llama(folder: Path, **changes: Any) -> Path:
    """Two blocks of half a group, and of one with a tail in `down_proj`, for jobs whose numbers
    nobody looks at: half of a `tiny_llama`'s time."""
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 160}
    return tiny_llama(folder, **(sizes | changes))


def tiny_opt(folder: Path, *, seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """A two-block OPT: biases, learned positions, other names."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "ffn_dim": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "init_std": 0.05,
    }
    return save_tiny(folder, OPTConfig(**(settings | changes)), seed=seed, dtype=dtype)
