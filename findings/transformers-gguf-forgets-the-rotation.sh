#!/usr/bin/env bash
# transformers 5.24.0: a model read from a GGUF file loses its rotary scaling and its caps on scores and logits.
#
# The header says `rope.scaling.type`, linear or yarn, and its factor, `attn_logit_softcapping` and
# `final_logit_softcapping`. `from_pretrained(folder, gguf_file=...)` reads none of these and takes what the
# architecture has by default: positions as they are, and of Gemma 2 caps of 50 and 30. Every weight comes out bit for
# bit, so a comparison of tensors finds nothing, and nothing is said. The published Gemma 3 of 4, 12 and 27 billion
# weights scale positions by 8 in their layers of full attention, so files of them are read as other models; so are
# Llama and Qwen2 stretched by yarn. Give the settings yourself (`config=`) where a header has these keys.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0
"$work/venv/bin/python" - "$work" 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
import sys

import gguf
import numpy as np
import torch
import transformers

COMMON = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}
BASE = {"rope_theta": 10000.0}
PLAIN = BASE | {"rope_type": "default"}
LINEAR = BASE | {"rope_type": "linear", "factor": 8.0}
YARN = BASE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR_KEYS = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
GEMMA2 = {
    "sliding_window": 512, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0
}
GEMMA2_KEYS = {"attention.sliding_window": 512, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA3 = {"sliding_window": 32, "query_pre_attn_scalar": 256}


def gemma3(full):
    return GEMMA3 | {"rope_parameters": {"full_attention": full, "sliding_attention": PLAIN}}


CASES = [
    ("llama, as it is by default", "llama", "Llama", {"rope_parameters": PLAIN}, {}),
    ("llama, linear by 8", "llama", "Llama", {"rope_parameters": LINEAR}, LINEAR_KEYS),
    ("llama, yarn by 4", "llama", "Llama", {"rope_parameters": YARN}, YARN_KEYS),
    ("qwen2, as it is by default", "qwen2", "Qwen2", {"rope_parameters": PLAIN}, {}),
    ("qwen2, yarn by 4", "qwen2", "Qwen2", {"rope_parameters": YARN}, YARN_KEYS),
    ("gemma3, as it is by default", "gemma3", "Gemma3", gemma3(PLAIN), {"attention.sliding_window": 32}),
    ("gemma3, linear by 8", "gemma3", "Gemma3", gemma3(LINEAR), {"attention.sliding_window": 32} | LINEAR_KEYS),
    ("gemma2, as it is by default", "gemma2", "Gemma2", GEMMA2, GEMMA2_KEYS),
    ("gemma2, logits capped at 1", "gemma2", "Gemma2", GEMMA2 | {"final_logit_softcapping": 1.0},
     GEMMA2_KEYS | {"final_logit_softcapping": 1.0}),
    ("gemma2, scores capped at 1", "gemma2", "Gemma2", GEMMA2 | {"attn_logit_softcapping": 1.0},
     GEMMA2_KEYS | {"attn_logit_softcapping": 1.0}),
]


def write(path, architecture, model):
    """A GGUF file of a model in float32 and of the header's keys that it needs."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(COMMON["head_dim"])
    writer.add_value_length(COMMON["head_dim"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    for name, value in model.state_dict().items():
        value = value.numpy()
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = value.reshape(-1, 2, 8, value.shape[1]).swapaxes(1, 2).reshape(value.shape)  # as ggml rotates
        if architecture.startswith("gemma") and "norm" in name:
            value = value + 1
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(value))
    return writer


ids = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(1))
print(f"transformers {transformers.__version__}, gguf 0.19.0; nats that a token loses")
for name, architecture, family, settings, keys in CASES:
    if family == "Gemma3":
        config = transformers.Gemma3TextConfig(**COMMON, **settings, tie_word_embeddings=True)
    else:
        tied = family == "Gemma2"
        config = getattr(transformers, f"{family}Config")(**COMMON, **settings, tie_word_embeddings=tied)
    kind = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = kind(config).eval()
    for name_of, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=0.3)
        elif "q_norm" in name_of or "k_norm" in name_of:
            parameter.data.fill_(3)
    writer = write(f"{sys.argv[1]}/model.gguf", architecture, model)
    for key, value in keys.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{architecture}.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = kind.from_pretrained(sys.argv[1], gguf_file="model.gguf", dtype=torch.float32).eval()
    stored = read.state_dict()
    same = all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        right, found = model(ids).logits.log_softmax(-1), read(ids).logits.log_softmax(-1)
    lost = float((right.exp() * (right - found)).sum(-1).mean())
    print(f"  {name:28}: weights equal {same}, loss {lost:.2g}")
    assert same
    assert lost < 1e-6 if name.endswith("default") else lost > 0.01, "something of it is read now"
PY
