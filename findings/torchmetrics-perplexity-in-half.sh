#!/usr/bin/env bash
# torchmetrics 1.9.0: a float16 model's perplexity is infinite once a token is unlikely, a bfloat16 one's a percent off.
#
# `Perplexity` takes the softmax of the logits in their own type, then the logarithm, and adds the logarithms of a batch
# up in that type, too (functional/text/perplexity.py). In float16 a probability below 3e-8 is 0 and its logarithm
# infinite, so one token of 18 nats makes the perplexity of a corpus infinite; so does a batch whose logarithms add up
# to more than 65,504. In bfloat16 a batch's sum has eight bits: with all 2,048 tokens in one batch perplexity comes out
# as 487 instead of 494, in 8 batches as 492. In float32 a token needs 104 nats to be infinite. Nothing is said, and the
# type check's docstring names float16 as input. Give it `logits.float()`. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install torchmetrics==1.9.0
"$work/venv/bin/python" - >"$work/found" 2>"$work/said" <<'PY' || { cat "$work/found" "$work/said"; exit 1; }
import math
import warnings
from importlib.metadata import version

import torch
from torch.nn.functional import cross_entropy
from torchmetrics.text import Perplexity

torch.manual_seed(0)
BATCHES, TOKENS, WORDS = 8, 256, 32000
logits = 3 * torch.randn(BATCHES, TOKENS, WORDS)
targets = torch.distributions.Categorical(logits=logits).sample()


def by_torchmetrics(logits: torch.Tensor, targets: torch.Tensor, at_once: int) -> float:
    metric = Perplexity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in zip(logits.split(at_once), targets.split(at_once), strict=True):
            metric.update(*part)
    return metric.compute().item()


def of_the_same_logits(logits: torch.Tensor, targets: torch.Tensor) -> float:
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten()).exp().item()


def off(found: float, true: float) -> float:
    return found / true - 1


print("FOUND torchmetrics", version("torchmetrics"), f"{BATCHES * TOKENS} tokens")
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    given = logits.to(dtype)
    true = of_the_same_logits(given, targets)
    once, each = (by_torchmetrics(given, targets, at_once) for at_once in (BATCHES, 1))
    print(f"FOUND {dtype}: {once:.2f} in one batch, {each:.2f} in {BATCHES}, by float32 {true:.2f}")
    if dtype == torch.float32:
        assert abs(off(once, true)) < 1e-5
    if dtype == torch.bfloat16:
        assert abs(off(once, true)) > 0.005, "logarithms are added in more than eight bits now"

unlikely, peak = targets.clone(), logits.clone()
unlikely[0, 0], peak[0, 0] = 7, -50.0
for nats in (12, 18, 110):
    peak[0, 0, 5], peak[0, 0, 7] = 0.0, -nats
    found = {dtype: by_torchmetrics(peak.to(dtype), unlikely, 1) for dtype in (torch.float32, torch.float16)}
    true = of_the_same_logits(peak.half(), unlikely)
    said = ", ".join(f"{dtype} {one:.2f}" for dtype, one in found.items())
    print(f"FOUND one token of {nats} nats: {said}, true {true:.2f}")
    assert abs(off(found[torch.float32], true)) < 1e-3 if nats < 104 else found[torch.float32] == math.inf
    assert (found[torch.float16] == math.inf) == (nats > 17), "an unlikely token has a logarithm in float16 now"

many = torch.zeros(16, 512, 4096, dtype=torch.float16)
once, each = (by_torchmetrics(many, torch.zeros(16, 512, dtype=torch.long), at_once) for at_once in (16, 1))
print(f"FOUND 8192 tokens of log(4096) nats in float16: {once:.2f} in one batch, {each:.2f} in 16")
assert once == math.inf and abs(off(each, 4096)) < 0.01, "sums of float16 do not overflow now"
PY
sed -n 's/^FOUND //p' "$work/found"
