#!/usr/bin/env bash
# CTranslate2 4.8.5: its converter drops the caps, the window and the query scale of Gemma 2, without a word.
#
# Gemma 2 bounds its attention scores by 50 and its logits by 30 (tanh), lets every second layer see the
# last 4096 tokens alone, and scales queries by query_pre_attn_scalar, which in the 27B model is not its
# head size. The converter reads none of these: models that differ in nothing else become the same
# folder, byte for byte. Without caps and windows, and with that scale at the head size, the folder
# computes what transformers does; with the published settings texts longer than the window, large scores
# and, by the cap on logits, every probability come out otherwise. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install transformers==5.24.0 ctranslate2==4.8.5
"$work/venv/bin/python" - "$work" 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
import hashlib
import sys
from pathlib import Path

import ctranslate2
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models

VOCABULARY = ["<bos>", "<eos>", "<unk>", *(f"t{i}" for i in range(61))]
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>")),
    bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
)
ids = torch.arange(3, 43)[None]
plain = {
    "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "sliding_window": 4096, "query_pre_attn_scalar": 16,
}


def both(name: str, **changed) -> tuple[np.ndarray, np.ndarray, str]:
    """Logits of transformers and of CTranslate2, and the digest of what the converter wrote."""
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, bos_token_id=0, eos_token_id=1, pad_token_id=2, **(plain | changed),
    )
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    for key, value in model.named_parameters():
        if value.ndim == 2:
            value.data.normal_(std=0.5 if "q_proj" in key or "k_proj" in key else 0.2)
    folder, made = Path(sys.argv[1], name), Path(sys.argv[1], f"{name}-made")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(made))
    digest = hashlib.sha256(b"".join(one.read_bytes() for one in sorted(made.iterdir()))).hexdigest()[:12]
    runner = ctranslate2.Generator(str(made), compute_type="float32")
    view = ctranslate2.StorageView.from_array
    found = runner.forward_batch(view(ids.numpy().astype(np.int32)), view(np.array([40], np.int32)))
    with torch.no_grad():
        return model(ids).logits[0].numpy(), np.array(found)[0], digest


print(f"ctranslate2 {ctranslate2.__version__}, transformers {transformers.__version__}")
digests = set()
for name, changed in {
    "plain": {},
    "attention capped": {"attn_logit_softcapping": 2.0},
    "logits capped": {"final_logit_softcapping": 2.0},
    "window of 4": {"sliding_window": 4},
    "another scale": {"query_pre_attn_scalar": 64},
}.items():
    right, found, digest = both(name, **changed)
    away = np.abs(found - right).max()
    print(f"{name:16} folder {digest}, logits up to {np.abs(right).max():.2f}, CTranslate2's differ by {away:.2g}")
    digests.add(digest)
    assert away < 0.001 if name == "plain" else away > 0.1, "something of it is read now"
assert len(digests) == 1, "something of it is written now"
PY
