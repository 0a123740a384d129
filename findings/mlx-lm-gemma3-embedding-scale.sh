#!/usr/bin/env bash
# mlx-lm 0.32.2: Gemma 3 in float32 is computed with an embedding scale that bfloat16 rounded.
#
# Gemma multiplies its embeddings by the square root of their width: 25.2982 for the 640 of Gemma 3 270M.
# mlx-lm's gemma3_text makes that number in bfloat16, 25.25, and casts it to the dtype of the activations;
# transformers casts the scale itself, so in float32 it is exact. All other sums agree: with weights in
# float32 the two differ by the scale alone, 3.6e-6 to 1.1e-5 nats per token on Gemma 3 270M (4e-11 for models
# without such a scale), and transformers with 25.25 gives what mlx-lm does. A test that holds a float32
# export to less than 1e-6 must know it. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install \
    torch==2.13.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.24.0
"$work/venv/bin/python" - "$work" <<'PY' 2>/dev/null
import json
import pathlib
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import torch
import transformers
from mlx_lm.utils import load_model

folder = pathlib.Path(sys.argv[1], "model")
torch.manual_seed(0)
config = transformers.Gemma3TextConfig(
    vocab_size=256, hidden_size=640, intermediate_size=256, num_hidden_layers=6, num_attention_heads=2,
    num_key_value_heads=1, head_dim=64, max_position_embeddings=64, initializer_range=0.1,
)
model = transformers.Gemma3ForCausalLM(config).eval()
model.save_pretrained(folder)
saved = json.loads((folder / "config.json").read_text())
older = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
(folder / "config.json").write_text(json.dumps(saved | older))
tokens = np.arange(32)[None]
found = np.array(load_model(folder)[0](mx.array(tokens)))


def apart(scale: float | None = None) -> float:
    """Largest difference of a logit between the libraries, over the logits' standard deviation."""
    if scale is not None:
        model.model.embed_tokens.embed_scale.fill_(scale)
    with torch.no_grad():
        return float(np.abs(model(torch.from_numpy(tokens)).logits[0].numpy() - found[0]).max() / found.std())


exact, rounded = apart(), apart(25.25)
print(f"mlx-lm {mlx_lm.__version__} in float32 against transformers {transformers.__version__}, sqrt(640) "
      f"as it is: {exact:.1e}, rounded to bfloat16: {rounded:.1e} of the logits' standard deviation")
assert rounded < 1e-4 < exact, "the scale is exact now"
PY
