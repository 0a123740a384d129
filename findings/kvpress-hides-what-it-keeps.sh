#!/usr/bin/env bash
# kvpress 0.5.5 with transformers 5.2.0: in a padded batch a compressed prompt is hidden from its own answer.
#
# A press cuts the cache after the prompt, best entries first, and its README lets one call `model.generate` under it.
# But `generate` goes on with the attention mask of the whole prompt, and transformers reads that by place in the
# cache. So a prompt with 8 tokens of padding in front cannot see the first 8 entries of its compressed cache, which are
# the 8 that the press holds to be most important. Where a prompt is as long as its padding and half of the cache is kept,
# nothing of it is seen: after its first token the answer goes by that token alone, whatever was asked. Without a press,
# or without padding, all is well. Nothing is said. Give prompts one by one, or of one length. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install kvpress==0.5.5 transformers==5.2.0 accelerate==1.15.0
"$work/venv/bin/python" - >"$work/found" 2>"$work/said" <<'PY' || { cat "$work/found" "$work/said"; exit 1; }
import contextlib
from importlib.metadata import version

import torch
from kvpress import KnormPress
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
PADDING, LENGTH = 0, 32
sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
heads = dict(num_attention_heads=2, num_key_value_heads=2, initializer_range=0.2)
model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation="eager")).eval()
prompt = torch.randint(3, 128, (1, LENGTH))


def answer(prompt: torch.Tensor, padded: int, press: KnormPress | None) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """The answer's tokens, the first layer's keys of the prompt, and which of them the second token sees, by head."""
    ids = torch.cat((torch.full((1, padded), PADDING), prompt), 1)
    with press(model) if press else contextlib.nullcontext():
        made = model.generate(
            ids,
            attention_mask=(ids != PADDING).long(),
            pad_token_id=PADDING,
            max_new_tokens=6,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    seen = made.attentions[1][0][0, :, 0, :-1] > 0
    return made.sequences[0, -6:].tolist(), made.past_key_values.layers[0].keys[0, :, : seen.shape[1]], seen


print("FOUND kvpress", version("kvpress"), "transformers", version("transformers"), "KnormPress(0.5)")
for padded in (0, 8, 16):
    short = prompt[:, padded:]
    plain = answer(short, padded, None)[0]
    assert plain == answer(short, 0, None)[0], "padding matters without a press, too"
    tokens, kept, seen = answer(short, padded, KnormPress(0.5))
    print(f"FOUND {LENGTH - padded} tokens behind {padded} of padding: {kept.shape[1]} entries are kept,", end=" ")
    print(f"the second token of the answer sees {seen.sum(-1).tolist()} of them by head, tokens {tokens}")
    norms = kept.norm(dim=-1)
    assert kept.shape[1] == LENGTH // 2 and (norms[:, 1:] >= norms[:, :-1]).all()  # best first: this press keeps small keys
    assert (seen == (torch.arange(LENGTH // 2) >= padded)).all(), "what is kept is seen now"
PY
sed -n 's/^FOUND //p' "$work/found"
