#!/usr/bin/env bash
# onnxruntime-genai 0.18.0: its model builder drops Llama's scaling of positions, Mistral's and Phi-3's window and
# OLMo's norm, so what it builds is another model than the one it was given.
#
# `LlamaModel` puts a `make_rope_init` of its own in the place of the common one and knows "llama3" alone: with "linear"
# (DeepSeek Coder, Vicuna 16k) or "yarn" positions are not scaled. A layer gets its window where config.json has
# `layer_types`; those of Mistral and Phi-3 have `sliding_window` alone, so Mistral 7B 0.1 and Phi-3 mini 4k see
# everything. OLMo's norm subtracts the mean; the builder writes RMS norms, and leaves out `clip_qkv`. The types that it
# does not know it refuses for other models; where nothing of this is set, logits agree to 1e-11. Short texts hide the
# window. Nothing is said. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 transformers==5.24.0
"$work/venv/bin/python" - "$work" >"$work/found" 2>"$work/said" <<'PY' || { cat "$work/found" "$work/said"; exit 1; }
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime_genai.models.builder import create_model, parse_extra_options
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

work = Path(sys.argv[1])
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(160)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2")
sizes = dict(vocab_size=160, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
common = dict(sizes, num_key_value_heads=2, initializer_range=0.15, max_position_embeddings=2048, eos_token_id=1, pad_token_id=2)
torch.manual_seed(0)
ids = torch.randint(3, 160, (1, 512))


def built(name: str, config: PreTrainedConfig) -> np.ndarray:
    """The squared error of each token's logits, of their energy, between the built model and transformers' one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(work / name)
    tokenizer.save_pretrained(work / name)
    asked = ("", str(work / name), str(work / f"{name}-onnx"), "fp32", "cpu", str(work / "cache"))
    create_model(*asked, **parse_extra_options(*asked, []))
    runtime = onnxruntime.InferenceSession(work / f"{name}-onnx" / "model.onnx")
    feed = {one.name: np.zeros((1, 2, 0, 32), np.float32) for one in runtime.get_inputs() if "past" in one.name}
    logits = runtime.run(["logits"], feed | {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())})[0]
    true = model(ids).logits.detach().numpy()
    return (((logits - true) ** 2).sum(-1) / (true**2).sum(-1))[0]


llama3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512)
yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)
print("FOUND", {name: version(name) for name in ("onnxruntime-genai", "transformers")}, "fp32, squared error of the logits, of their energy")
for name, config, same in (
    ("Llama", LlamaConfig(**common), 512),
    ("Llama with llama3", LlamaConfig(**common, rope_parameters=llama3 | dict(rope_theta=10000.0)), 512),
    ("Llama with linear", LlamaConfig(**common, rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)), 1),
    ("Llama with yarn", LlamaConfig(**common, rope_parameters=yarn | dict(rope_theta=10000.0)), 1),
    ("Mistral", MistralConfig(**common, head_dim=32, sliding_window=None), 512),
    ("Mistral with a window of 64", MistralConfig(**common, head_dim=32, sliding_window=64), 64),
    ("Phi-3", Phi3Config(**common, original_max_position_embeddings=2048, sliding_window=None), 512),
    ("Phi-3 with a window of 64", Phi3Config(**common, original_max_position_embeddings=2048, sliding_window=64), 64),
    ("OLMo", OlmoConfig(**common), 0),
    ("OLMo with clip_qkv", OlmoConfig(**common, clip_qkv=0.5), 0),
):
    error = built(name.replace(" ", "-"), config)
    print(f"FOUND {name}:", ", ".join(f"{error[i]:.1e} at token {i}" for i in (0, 10, 60, 70, 500)))
    assert error[:same].max(initial=0) < 1e-9
    assert same == 512 or np.median(error[same + 8 :]) > 0.01, f"{name} is built as it is now"
PY
sed -n 's/^FOUND //p' "$work/found"
