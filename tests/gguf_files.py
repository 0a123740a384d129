"""Tiny models as GGUF files in float32, written as llama.cpp's converter writes them.

Names come from the gguf package's own map, so that nothing here repeats Bitmill's tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from tiny import byte_tokenizer

Tensors = dict[str, np.ndarray]
Header = Callable[[gguf.GGUFWriter], None]

ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}
"""model_type of transformers -> GGUF architecture, where they differ."""


def write_gguf(
    path: Path,
    folder: Path,
    header: Header | None = None,
    change: Callable[[Tensors], None] | None = None,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """Write the model of a Hugging Face folder; header and change add to settings and tensors.

    tokenizer: writes that in place of the usual one, SentencePiece for Gemma, else byte-level.
    """
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(kind, kind))
    writer.add_name("tiny")
    _KEYS.get(kind, _write_usual)(writer, config)
    (tokenizer or (write_pieces if kind.startswith("gemma") else write_bytes))(writer)
    tensors = _tensors(folder, config)
    if header is not None:
        header(writer)
    if change is not None:
        change(tensors)
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_bytes(writer: gguf.GGUFWriter, merges: Sequence[str] = ("a b", "c d")) -> None:
    """A byte-level tokenizer with two merges in place of the last two bytes."""
    vocabulary = byte_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens[:-2], "ab", "cd"])
    writer.add_token_merges([*merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def write_pieces(writer: gguf.GGUFWriter, words: Sequence[str] = ("ab", "\u2581ab")) -> None:
    """A SentencePiece tokenizer of 256 tokens: special ones, bytes that no piece covers, letters
    and words, of which the first is merged first."""
    letters = "\u2581abcdefghijklmnopqrstuvwxyz"
    pieces = ["<unk>", "<s>", "</s>", "<turn>", "\n", *letters, *words]
    count = len(pieces) - len(words)
    pieces += [f"<0x{byte:02X}>" for byte in range(256 - len(pieces))]
    types = [gguf.TokenType.NORMAL] * len(pieces)
    types[:4] = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 3]
    types[count + len(words) :] = [gguf.TokenType.BYTE] * (len(pieces) - count - len(words))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(place) for place in range(256)])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    return rope.get("full_attention", rope)


def _head(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _write_usual(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope, head = _rope(config), _head(config)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(config.get("layer_norm_eps") or config["norm_epsilon"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1)))
    if config["model_type"] in ("gemma2", "gemma3_text", "phi3", "starcoder2", "mistral"):
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _write_gemma(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    _write_usual(writer, config)
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if local := config["rope_parameters"].get("sliding_attention"):
        writer.add_rope_freq_base_swa(local["rope_theta"])


def _write_experts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    _write_usual(writer, config)
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _write_phi3(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    _write_usual(writer, config)
    rope = _rope(config)
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(original)
    if rope["rope_type"] == "longrope":
        scale = config["max_position_embeddings"] / original
        stretch = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(stretch)


def _write_stablelm(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    _write_usual(writer, config)
    writer.add_parallel_residual(config["use_parallel_residual"])


def _write_falcon(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    keys = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
    writer.add_context_length(2048)
    writer.add_tensor_data_layout("jploski")
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(4 * config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(keys)
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _write_bloom(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(4 * config["hidden_size"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_head_count_kv(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _write_gpt2(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"] or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


_KEYS: dict[str, Callable[[gguf.GGUFWriter, dict[str, Any]], None]] = {
    "mixtral": _write_experts,
    "qwen3_moe": _write_experts,
    "gemma2": _write_gemma,
    "gemma3_text": _write_gemma,
    "phi3": _write_phi3,
    "stablelm": _write_stablelm,
    "falcon": _write_falcon,
    "bloom": _write_bloom,
    "gpt2": _write_gpt2,
}


def _tensors(folder: Path, config: dict[str, Any]) -> Tensors:
    kind = config["model_type"]
    arch = gguf.MODEL_ARCH[ARCHITECTURES.get(kind, kind).upper()]
    blocks = config.get("num_hidden_layers") or config["n_layer"]
    names = gguf.get_tensor_name_map(arch, blocks)
    result: Tensors = {}
    for name, tensor in _stacked(load_file(folder / "model.safetensors")).items():
        known = name.removeprefix("transformer.") if kind == "bloom" else name
        stored = names.get_name(known, try_suffixes=(".weight", ".bias"))
        assert stored is not None, f"the gguf package has no name for {name}"
        result[stored] = _laid_out(name, tensor, config)
    return result | _rope_factors(config)


def _stacked(tensors: dict[str, Any]) -> Tensors:
    """Experts, and the norms of single heads, as one tensor."""
    plain: Tensors = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        many = [i for i, part in enumerate(parts[:-2]) if part in ("experts", "norms")]
        if not many:
            plain[name] = tensor.numpy()
            continue
        (place,) = many
        index = int(parts.pop(place + 1))
        if parts[place] == "norms":
            parts.pop(place)
        stack = stacks.setdefault(".".join(parts), [])
        stack.extend([np.empty(0)] * (index + 1 - len(stack)))
        stack[index] = tensor.numpy()
    return plain | {name: np.stack(stack) for name, stack in stacks.items()}


def _laid_out(name: str, value: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """The values in the layout of the file."""
    kind, rest = config["model_type"], value.shape[1:]
    if kind in ("llama", "mistral", "mixtral") and ".q_proj." in name:
        return _interleaved(value, config["num_attention_heads"])
    if kind in ("llama", "mistral", "mixtral") and ".k_proj." in name:
        return _interleaved(value, config["num_key_value_heads"])
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return value.T
    if kind == "bloom" and "query_key_value" in name:
        qkv = value.reshape(config["n_head"], 3, -1, *rest)
        return np.concatenate([qkv[:, i].reshape(-1, *rest) for i in range(3)])
    if kind == "falcon" and "query_key_value" in name:
        heads = config["num_attention_heads"]
        keys = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
        head = config["hidden_size"] // heads
        qkv = value.reshape(keys, heads // keys + 2, head, *rest)
        parts = qkv[:, :-2], qkv[:, [-2]], qkv[:, [-1]]
        return np.concatenate([part.reshape(-1, *rest) for part in parts])
    return value


def _interleaved(value: np.ndarray, heads: int) -> np.ndarray:
    """The row order in which rotary projections are kept: halves of a head interleaved."""
    rows, *rest = value.shape
    return value.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(value.shape)


def _rope_factors(config: dict[str, Any]) -> Tensors:
    rope = _rope(config)
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    head, factor = _head(config), rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, head, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / head)
        smooth = (original / length - low) / (high - low)
        if length < original / high:
            factors.append(1.0)
        elif length > original / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": np.array(factors, np.float32)}
