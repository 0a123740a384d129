#!/usr/bin/env bash
# onnxruntime-genai 0.18.0: its model builder takes `int4_block_size`, `int4_accuracy_level` and their kin, and does
# nothing with them.
#
# Settings of 4-bit weights used to have these names, and pages and scripts still do. They have lost their prefix; the
# text of `--help` says that the old ones "are deprecated aliases that still work". They do not: no code knows them, and
# what nobody knows is not refused. So blocks stay at 32 whatever is asked for, zero points and nodes to leave out are
# not heard of, and with `int4_accuracy_level=1`, which is there to keep activations in float, a CPU still rounds them to
# 8 bits (onnxruntime-rounds-activations-unasked.sh). Without the prefix all of them work. Nothing is said.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 transformers==5.24.0
"$work/venv/bin/python" - "$work" >"$work/found" 2>"$work/said" <<'PY' || { cat "$work/found" "$work/said"; exit 1; }
import inspect
import sys
from importlib.metadata import version
from pathlib import Path

import onnx
import torch
from onnxruntime_genai.models.builder import create_model, get_args, parse_extra_options
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

work = Path(sys.argv[1])
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(160)}, unk_token="w0"))
sizes = dict(vocab_size=160, hidden_size=128, intermediate_size=256, num_hidden_layers=2, head_dim=32)
heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, eos_token_id=1, pad_token_id=2)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(work / "model")
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2").save_pretrained(work / "model")


def built(*options: str) -> tuple[set[tuple[int, int]], int, int]:
    """Block size and accuracy level of the quantized products, how many there are, and how many have zero points."""
    out = work / f"out-{len(list(work.iterdir()))}"
    asked = ("", str(work / "model"), str(out), "int4", "cpu", str(work / "cache"))
    create_model(*asked, **parse_extra_options(*asked, list(options)))
    nodes = [node for node in onnx.load(out / "model.onnx", load_external_data=False).graph.node if node.op_type == "MatMulNBits"]
    settings = [{one.name: one.i for one in node.attribute} for node in nodes]
    kinds = {(one["block_size"], one["accuracy_level"]) for one in settings}
    return kinds, len(nodes), sum(len(node.input) > 3 and node.input[3] != "" for node in nodes)


print("FOUND onnxruntime-genai", version("onnxruntime-genai"), "products of 4 bits: (block size, accuracy level), their number, with zero points")
assert "deprecated aliases that still work" in inspect.getsource(get_args)
plain = built()
print("FOUND as it is:", *plain)
for option in ("block_size=128", "accuracy_level=1", "is_symmetric=false", "nodes_to_exclude=/lm_head/MatMul"):
    new, old = built(option), built(f"int4_{option}")
    print(f"FOUND {option}:", *new, f"; int4_{option}:", *old)
    assert new != plain and old == plain, f"int4_{option} is heard now"
PY
if grep -h int4_ "$work/found" "$work/said" | grep -v -e ^FOUND -e "^Extra options:"; then
    echo "it is said now"
    exit 1
fi
sed -n 's/^FOUND //p' "$work/found"
