#!/usr/bin/env bash
# nvidia-modelopt 0.47.0: `mtq.quantize(model, mtq.FP8_KV_CFG, ...)`, a setting for the KV cache, rounds the whole model
# to INT8, head and embedding included.
#
# `mtq.quantize` puts a quantizer at each weight and each activation, all switched on at 8-bit integers with one scale
# for a tensor. Settings for models begin with an entry that switches them off. Those for the KV cache (FP8_KV_CFG,
# NVFP4_KV_CFG and their kin, which stand beside the others in `mtq.config.choices`) have none: keys and values get
# FP8, and everything else keeps that INT8, which nobody has named. A comment in the source says that they are to be
# merged with another setting; nothing checks it, and nothing is said. Weights in FP8, FP8_DEFAULT_CFG, leave the head
# and the embedding alone. Begin with {"quantizer_name": "*", "enable": False} and only the cache is rounded.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install transformers==5.14.1 accelerate==1.15.0 requests
pip install nvidia-modelopt==0.47.0
"$work/venv/bin/python" - >"$work/found" 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
import copy
from collections import Counter
from importlib.metadata import version

import modelopt.torch.quantization as mtq
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).eval()
ids = torch.randint(0, 128, (2, 32))


def switched_on(config: dict) -> dict[str, Counter]:
    """What is rounded: for each kind of quantizer how many there are of which type."""
    made = mtq.quantize(copy.deepcopy(model), copy.deepcopy(config), lambda model: model(ids))
    found: dict[str, Counter] = {}
    for name, module in made.named_modules():
        if isinstance(module, mtq.nn.TensorQuantizer) and module.is_enabled:
            kind = "INT8" if module.num_bits == 8 else "FP8" if tuple(module.num_bits) == (4, 3) else str(module.num_bits)
            place = "head" if name.startswith("lm_head") else "embedding" if "embed_tokens" in name else name.split(".")[-1]
            found.setdefault(place, Counter())[kind] += 1
    return found


print("FOUND nvidia-modelopt", version("nvidia-modelopt"))
off = {"quantizer_name": "*", "enable": False}
cache = switched_on(mtq.FP8_KV_CFG)
alone = switched_on({"quant_cfg": [off, *mtq.FP8_KV_CFG["quant_cfg"]], "algorithm": "max"})
weights = switched_on(mtq.FP8_DEFAULT_CFG)
for name, found in {"FP8_KV_CFG": cache, "the same behind an entry that switches off": alone, "FP8_DEFAULT_CFG": weights}.items():
    print(f"FOUND {name}:", {place: dict(kinds) for place, kinds in found.items()})
assert cache.get("weight_quantizer") == Counter(INT8=14) and "head" in cache and "embedding" in cache, "only the cache is rounded now"
assert cache["k_bmm_quantizer"] == cache["v_bmm_quantizer"] == Counter(FP8=2)
assert set(alone) == {"k_bmm_quantizer", "v_bmm_quantizer"}
assert "head" not in weights and "embedding" not in weights
assert "FP8_KV_CFG" in mtq.config.choices
PY
sed -n 's/^FOUND //p' "$work/found"
