#!/usr/bin/env bash
# llm-compressor 0.14.0.1: SmoothQuant changes what Gemma 2 and Gemma 3 compute, before anything is rounded.
#
# SmoothQuant divides a norm's weight by a number per channel and multiplies the columns of the linears behind
# it by the same number, so a model in float computes what it did. For Gemma2ForCausalLM and Gemma3ForCausalLM
# llm-compressor takes its default mapping: `gate_proj` and `up_proj` behind `post_attention_layernorm`. In
# Llama that norm feeds them. In Gemma it ends the attention's branch, and `pre_feedforward_layernorm` feeds
# the MLP: channels are divided in one place and multiplied in another, and the logits of a random model move
# by more than their own spread. With a mapping that names `pre_feedforward_layernorm` they stay.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install \
    torch==2.13.0 llmcompressor==0.14.0.1 transformers==5.17.0
cat >"$work/smooth.py" <<'PY'
import sys

import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from tokenizers import Tokenizer, models

SHAPE = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=64, pad_token_id=0,
)
CONFIGS = {
    "Llama": transformers.LlamaConfig, "Gemma2": transformers.Gemma2Config,
    "Gemma3": transformers.Gemma3TextConfig,
}
RIGHT = [
    [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
    [["re:.*gate_proj", "re:.*up_proj"], "re:.*pre_feedforward_layernorm"],
]
tokens = torch.arange(256).reshape(8, 32)
rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
processor = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a")


def moved(kind: str, mappings: list | None = None) -> float:
    """By how much smoothing alone moves the logits at most, in standard deviations of the logits."""
    folder = f"{sys.argv[1]}/{kind}"
    torch.manual_seed(0)
    maker = getattr(transformers, f"{kind}ForCausalLM")
    maker(CONFIGS[kind](**SHAPE)).save_pretrained(folder)
    model = maker.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        before = model(tokens).logits
        oneshot(
            model=model, processor=processor, dataset=rows, max_seq_length=32, num_calibration_samples=8,
            recipe=[SmoothQuantModifier(smoothing_strength=0.5, mappings=mappings)], pipeline="basic",
        )
        return float((model(tokens).logits - before).abs().max() / before.std())


found = {kind: moved(kind) for kind in CONFIGS}
right = {kind: moved(kind, RIGHT) for kind in ("Gemma2", "Gemma3")}
print("largest change of a logit, in standard deviations of the logits, by SmoothQuant in float32:")
print("default mappings:", {kind: f"{value:.1e}" for kind, value in found.items()})
print("with pre_feedforward_layernorm:", {kind: f"{value:.1e}" for kind, value in right.items()})
assert found["Llama"] < 1e-4 and max(right.values()) < 1e-4
assert min(found["Gemma2"], found["Gemma3"]) > 1, "Gemma's MLP is smoothed where it reads now"
PY
LLM_COMPRESSOR_LOG_DISABLED=true TOKENIZERS_PARALLELISM=false "$work/venv/bin/python" "$work/smooth.py" "$work" 2>/dev/null
