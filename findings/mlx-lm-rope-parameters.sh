#!/usr/bin/env bash
# mlx-lm 0.32.2: the rotary base of a config.json that transformers 5 wrote is ignored without a word.
#
# transformers 5 writes `rope_parameters: {"rope_theta": ..., "rope_type": ...}`; mlx-lm's llama, qwen2
# and gemma3_text (not its qwen3) read `rope_theta` and `rope_scaling` at the top level alone, and take
# their defaults where these are missing: 10,000 for llama. The model loads and computes with another
# base; for SmolLM2 (base 100,000) that costs 0.06 nats per token. With `rope_theta` beside
# `rope_parameters` it computes the right thing. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install \
    "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0
"$work/venv/bin/python" - "$work" <<'PY'
import json
import pathlib
import sys

import mlx.core as mx
import mlx_lm
import transformers
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import load_model

folder, base = pathlib.Path(sys.argv[1]), 100_000.0
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": base},
)
config.save_pretrained(folder)
saved = json.loads((folder / "config.json").read_text())
assert saved["rope_parameters"]["rope_theta"] == base and "rope_theta" not in saved
mx.random.seed(0)
weights = tree_flatten(llama.Model(llama.ModelArgs.from_dict(saved)).parameters())
mx.save_safetensors(str(folder / "model.safetensors"), dict(weights), {"format": "mlx"})


def computed(**extra):
    """What the folder computes with these keys beside those that transformers saved."""
    (folder / "config.json").write_text(json.dumps(saved | extra))
    return load_model(folder)[0](mx.arange(32)[None])


plain = computed()
print(f"mlx-lm {mlx_lm.__version__}: as with base 10,000: {mx.array_equal(plain, computed(rope_theta=1e4)).item()}, "
      f"as with base 100,000: {mx.array_equal(plain, computed(rope_theta=base)).item()}")
assert mx.array_equal(plain, computed(rope_theta=1e4)), "rope_parameters are read now"
assert not mx.array_equal(plain, computed(rope_theta=base))
PY
