#!/usr/bin/env bash
# transformers 5.23.0 with hqq 0.2.8.post1: a quantized cache forgets its beginning, since it rounds all of it again for
# every 128 tokens.
#
# `QuantizedCache("hqq", config)`, which `generate(cache_implementation="quantized", cache_config={"backend": "hqq"})`
# makes, keeps 128 tokens unrounded. When they are full, everything is dequantized and quantized anew with them. On
# the same groups that would change nothing. But by default, `axis_key=0` and `axis_value=0`, hqq cuts the whole tensor
# into 64 parts and makes groups of numbers that lie at the same place of each, so more tokens mean other groups, and
# each time the rounding adds to what is there. The error of a prompt's keys grows with every token that follows: at 4
# bits 12 times as much behind 1,536 tokens, 9 percent of their energy instead of 0.7; at 2 bits it is then more than
# the keys themselves. The newest tokens have the least of it, so a short test shows nothing. With both axes 1, and
# with quanto's backend for heads of 64 or 128, the groups stay and so does the error. Nothing is said.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install transformers==5.23.0 accelerate==1.15.0 einops termcolor
pip install --no-deps hqq==0.2.8.post1
"$work/venv/bin/python" - 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
from importlib.metadata import version

import torch
from transformers import LlamaConfig, QuantizedCache

HEADS, SIZE, PROMPT, FLUSHES = 2, 64, 100, 12
config = LlamaConfig(
    num_hidden_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=SIZE
)


def losses(**settings):
    """Relative squared error of a prompt's keys and values, each time 128 further tokens have come, 16 at once."""
    torch.manual_seed(0)
    cache = QuantizedCache("hqq", config, **settings)
    prompt = torch.randn(2, 1, HEADS, PROMPT, SIZE)
    cache.update(*prompt, 0)
    found = []
    for _ in range(FLUSHES):
        for _ in range(8):
            read = torch.stack(cache.update(*torch.randn(2, 1, HEADS, 16, SIZE), 0))
        error = (read[..., :PROMPT, :] - prompt).square().sum((1, 2, 3, 4)) / prompt.square().sum((1, 2, 3, 4))
        found.append(error)
    return torch.stack(found)


print(f"transformers {version('transformers')}, hqq {version('hqq')}: error of the first {PROMPT} tokens, keys and values,")
print("behind 128, 256, 512 and 1,536 tokens more")
for bits in (8, 4, 2):
    for name, settings in {"as it is set": {}, "axes of 1": {"axis_key": 1, "axis_value": 1}}.items():
        found = losses(nbits=bits, **settings)
        shown = ", ".join(f"{key:.5f} {value:.5f}" for key, value in found[[0, 1, 3, -1]].tolist())
        print(f"  {bits} bits, {name:12}: {shown}")
        grown = found[-1] / found[0]
        if settings:
            assert (grown < 1.01).all()
        else:
            assert (grown > (5 if bits == 2 else 8)).all(), "the error does not grow any more"
            assert bits != 2 or (found[-1] > 1).all()
PY
