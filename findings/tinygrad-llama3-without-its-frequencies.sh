#!/usr/bin/env bash
# tinygrad 0.13.0: GGUF files of Llama 3.1 and 3.2 are run with positions unscaled, and files of architectures that it
# does not know as if they were Llama's.
#
# Such a file has the scaling of positions as a tensor, `rope_freqs.weight`, that divides each frequency; others have it
# in the header (`rope.scaling.type` and `.factor`). `Transformer.from_gguf` (llm/model.py), by which
# `python -m tinygrad.llm` runs llama3.1:8b, llama3.2:1b and the others of its list, reads neither: logits are those of
# a file without. Nor does it look for architectures that it knows: Granite's four multipliers and Gemma 3's window and
# norms behind attention and MLP are left out, and what is left runs. Weights are read right, and a short text hides the
# scaling. Nothing is said. 0.14.0 has the same lines, but its wheel lacks a module that they import. Fails if that
# changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check -q install tinygrad==0.13.0 gguf==0.19.0 numpy
DEV=PYTHON PYTHON=1 "$work/venv/bin/python" - "$work" >"$work/found" 2>"$work/said" <<'PY' || { cat "$work/found" "$work/said"; exit 1; }
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
from tinygrad import Tensor
from tinygrad.llm.model import Transformer

work = Path(sys.argv[1])
rng = np.random.default_rng(0)
WIDTH, HEADS, HEAD, WORDS, TOKENS, BASE = 16, 2, 8, 12, 16, 100.0
names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
weights = {f"blk.0.{name}": 0.5 * rng.normal(size=(WIDTH, WIDTH)) for name in names}
weights |= {"token_embd": rng.normal(size=(WORDS, WIDTH)), "output": rng.normal(size=(WORDS, WIDTH))}
weights |= {name: np.ones(WIDTH) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}
weights = {f"{name}.weight": value.astype(np.float16).astype(np.float32) for name, value in weights.items()}
ids = rng.integers(0, WORDS, TOKENS)


def by_tinygrad(architecture: str, settings: dict[str, float | str], more: dict[str, np.ndarray]) -> np.ndarray:
    """Logits [tokens, words] of a file with these settings and tensors beside the common ones."""
    file = gguf.GGUFWriter(work / "model.gguf", architecture)
    file.add_context_length(TOKENS)
    file.add_embedding_length(WIDTH)
    file.add_feed_forward_length(WIDTH)
    file.add_block_count(1)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(BASE)
    file.add_token_list([f"w{i}" for i in range(WORDS)])
    for name, value in settings.items():
        (file.add_string if isinstance(value, str) else file.add_float32)(f"{architecture}.{name}", value)
    for name, value in (weights | more).items():
        file.add_tensor(name, value)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    model, _ = Transformer.from_gguf(work / "model.gguf")
    x = model.token_embd(Tensor(ids[None].astype(np.int32))).float()
    for block in model.blk:
        x = block(x, 0)
    return model.output(model.output_norm(x)).float().numpy()[0].astype(np.float64)


def by_hand(factors: np.ndarray) -> np.ndarray:
    """Llama's logits; a file's queries and keys have each pair of a rotation side by side."""
    w = {name.removeprefix("blk.0.").removesuffix(".weight"): value.astype(float) for name, value in weights.items()}
    angles = np.arange(TOKENS)[:, None] / (BASE ** (np.arange(HEAD // 2) * 2 / HEAD) * factors)
    turns = np.exp(1j * angles)[:, None]

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def turned(name: str, x: np.ndarray) -> np.ndarray:
        pairs = (x @ w[name].T).reshape(TOKENS, HEADS, HEAD // 2, 2)
        return (pairs[..., 0] + 1j * pairs[..., 1]) * turns

    x = w["token_embd"][ids]
    y = norm(x)
    scores = np.einsum("thp,shp->hts", turned("attn_q", y), turned("attn_k", y).conj()).real / HEAD**0.5
    scores = np.exp(np.where(np.tri(TOKENS, dtype=bool), scores, -np.inf))
    seen = scores / scores.sum(-1, keepdims=True)
    values = (y @ w["attn_v"].T).reshape(TOKENS, HEADS, HEAD)
    x = x + np.einsum("hts,shd->thd", seen, values).reshape(TOKENS, WIDTH) @ w["attn_output"].T
    y = norm(x)
    gate = y @ w["ffn_gate"].T
    x = x + (gate / (1 + np.exp(-gate)) * (y @ w["ffn_up"].T)) @ w["ffn_down"].T
    return norm(x) @ w["output"].T


def error(found: np.ndarray, true: np.ndarray) -> float:
    return float(((found - true) ** 2).sum() / (true**2).sum())


factors = np.array([1, 2, 4, 8], np.float32)
print("FOUND tinygrad", version("tinygrad"), "squared error of the logits, of their energy")
plain, scaled = by_hand(np.ones(HEAD // 2)), by_hand(factors)
for name, settings, more in (
    ("plain", {}, {}),
    ("rope_freqs.weight", {}, {"rope_freqs.weight": factors}),
    ("linear", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}),
):
    found = by_tinygrad("llama", settings, more)
    true = plain if name == "plain" else scaled if more else by_hand(np.full(HEAD // 2, 4.0))
    print(f"FOUND Llama, {name}: {error(found, true):.1e} to what the file says, {error(found, plain):.1e} without it")
    assert error(found, plain) < 1e-5, f"{name} is read now"
    assert name == "plain" or error(found, true) > 1e-3

granite = {"embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.015625, "logit_scale": 16.0}
behind = {f"blk.0.{name}.weight": np.full(WIDTH, 3, np.float32) for name in ("post_attention_norm", "post_ffw_norm")}
windows = {"attention.sliding_window": 8.0}
for name, settings, more in (("granite", granite, {}), ("gemma3", windows, behind)):
    bare, found = by_tinygrad(name, {}, {}), by_tinygrad(name, settings, more)
    print(f"FOUND {name}: {error(found, bare):.1e} between files with {[*settings, *more]} and without")
    assert (found == bare).all(), f"{name} is read, or refused, now"
PY
sed -n 's/^FOUND //p' "$work/found"
