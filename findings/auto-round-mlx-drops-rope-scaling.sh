#!/usr/bin/env bash
# auto-round 0.16.1: what it exports for MLX has lost the rotary scaling of Llama 3 and Gemma 3.
#
# transformers 5 writes a model's rotary settings as one entry, `rope_parameters`; mlx-lm 0.32.2 reads `rope_theta` and
# `rope_scaling`. For format "mlx" auto-round takes the entry apart and puts its parts at the top of config.json. The
# base arrives, but type and factors (`rope_type`, `factor`, `low_freq_factor` and so on) lie where nobody looks, and
# `rope_parameters` is gone. So Llama 3.1 and 3.2, Gemma 3 from 4 billion weights on and models stretched by yarn are
# computed with positions as they are: to the last bit what they give with no scaling at all. The first tokens differ
# little, so a short answer shows nothing; neither side says a word. With `rope_scaling` written into the same
# config.json mlx-lm computes what it should. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install auto-round==0.16.1 transformers==5.24.0 accelerate==1.15.0
pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2
cat >"$work/export.py" <<'PY'
import sys

import torch
from auto_round import AutoRound
from tokenizers import Tokenizer, models
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

work = sys.argv[1]
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2")
torch.manual_seed(0)
sizes = dict(vocab_size=128, hidden_size=128, intermediate_size=128, num_hidden_layers=6, head_dim=64, initializer_range=0.2)
heads = dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=131072)
llama3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
llama = LlamaConfig(**sizes, **heads, rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, **llama3))
gemma = Gemma3TextConfig(
    **sizes,
    **heads,
    sliding_window=512,
    layer_types=["sliding_attention"] * 5 + ["full_attention"],
    rope_parameters={
        "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
        "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1000000.0),
    },
)
for name, model in {"llama": LlamaForCausalLM(llama), "gemma": Gemma3ForCausalLM(gemma)}.items():
    model.save_pretrained(f"{work}/{name}")
    tokenizer.save_pretrained(f"{work}/{name}")
    made = AutoRound(f"{work}/{name}", scheme="W4A16", iters=0, disable_opt_rtn=True, device_map="cpu")
    made.quantize_and_save(f"{work}/{name}-mlx", format="mlx")
PY
"$work/venv/bin/python" "$work/export.py" "$work" >"$work/said" 2>&1 || { tail -30 "$work/said"; exit 1; }
"$work/venv/bin/python" - "$work" 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

work = Path(sys.argv[1])
scaling = {
    "llama": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    "gemma": dict(rope_type="linear", factor=8.0),
}
ids = mx.array(np.random.default_rng(0).integers(3, 128, (1, 2048)))
print({name: version(name) for name in ("auto-round", "mlx-lm", "transformers")})
for name, settings in scaling.items():
    (file,) = work.glob(f"{name}-mlx/**/config.json")
    config = json.loads(file.read_text())
    logits = {}
    for way, changed in {"as written": {}, "without": {"rope_scaling": None}, "with": {"rope_scaling": settings}}.items():
        file.write_text(json.dumps(config | changed))
        logits[way] = np.array(load_model(file.parent)[0](ids).astype(mx.float32))[0]
    same = bool((logits["as written"] == logits["without"]).all())
    error = ((logits["as written"] - logits["with"]) ** 2).sum(-1) / (logits["with"] ** 2).sum(-1)
    lost = {key: config[key] for key in ("rope_type", "factor", "rope_theta")}
    print(f"{name}: config.json has rope_scaling: {'rope_scaling' in config}, rope_parameters: {'rope_parameters' in config}, at the top {lost}")
    print(f"  logits are those without scaling: {same}; squared error against those with it: ", end="")
    print(", ".join(f"{error[i]:.2g} at token {i}" for i in (10, 500, 2000)))
    assert "rope_scaling" not in config and "rope_parameters" not in config, "scaling is exported now"
    assert same and error.mean() > 0.0001
PY
