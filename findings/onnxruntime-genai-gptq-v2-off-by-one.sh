#!/usr/bin/env bash
# onnxruntime-genai 0.18.0: its model builder reads GPTQ checkpoints of version 2 with every zero point one too high.
#
# GPTQ's first format stores zero points less one, its second ("checkpoint_format": "gptq_v2" in config.json, which
# GPTQModel writes and vLLM reads) as they are. The builder adds the one to both (`handle_qzeros` in loaders/gptq.py)
# and does not look which it has. So all weights of a linear are a whole step too small: at 4 bits the logits have
# nothing in common with the model's, at 8 bits their error doubles, while the same weights in the first format are read
# well (what error is left there is that of embedding and head, which `-p int4` rounds). Nothing is said.
# Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 onnx-ir==1.1.0 onnxscript==0.7.2 transformers==5.24.0
"$work/venv/bin/python" - "$work" >"$work/found" 2>"$work/said" <<'PY' || { cat "$work/found" "$work/said"; exit 1; }
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime_genai.models.builder import create_model, parse_extra_options
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

work = Path(sys.argv[1])
GROUP = 32
words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(160)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2")
sizes = dict(vocab_size=160, hidden_size=128, intermediate_size=256, num_hidden_layers=2, head_dim=32)
heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.15)
config = LlamaConfig(**sizes, **heads, eos_token_id=1, pad_token_id=2, dtype="float32", architectures=["LlamaForCausalLM"])
torch.manual_seed(0)
source = LlamaForCausalLM(config).state_dict()
ids = torch.randint(3, 160, (1, 64))


def in_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int64 [N, K] as int32 [N, K * bits / 32], the first code lowest."""
    shifted = codes.reshape(len(codes), -1, 32 // bits) << bits * torch.arange(32 // bits)
    return torch.from_numpy(shifted.sum(-1).numpy().astype(np.uint32).view(np.int32))


def quantized(weight: torch.Tensor, bits: int, symmetric: bool, stored: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """GPTQ's tensors in version `stored`, and the weights that they stand for."""
    groups, top = weight.double().unflatten(1, (-1, GROUP)), 2**bits - 1
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / top).half()
    zero = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(1, top)
    codes = (groups / scale + zero).round().clamp(0, top)
    zeros = zero[..., 0].T.long() - (1 if stored == 1 else 0)
    tensors = {
        "qweight": in_words(codes.flatten(1).long(), bits).T.contiguous(),
        "qzeros": in_words(zeros, bits),
        "scales": scale[..., 0].T.contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return tensors, ((codes - zero) * scale.double()).flatten(1).float()


def built(bits: int, symmetric: bool, stored: int) -> tuple[float, list[int]]:
    """The squared error of the logits, of their energy, and the zero points of one linear as the builder writes them."""
    folder, out = (work / f"{bits}-{symmetric}-{stored}-{kind}" for kind in ("gptq", "onnx"))
    model, tensors = LlamaForCausalLM(config).eval(), {}
    state = dict(source)
    for name in source:
        if "_proj" in name:
            made, state[name] = quantized(source[name], bits, symmetric, stored)
            tensors |= {name.replace("weight", kind): tensor for kind, tensor in made.items()}
        else:
            tensors[name] = source[name]
    model.load_state_dict(state)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = dict(quant_method="gptq", bits=bits, group_size=GROUP, desc_act=False, sym=symmetric, lm_head=False)
    settings["checkpoint_format"] = {1: "gptq", 2: "gptq_v2"}[stored]
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": settings}))
    tokenizer.save_pretrained(folder)
    asked = ("", str(folder), str(out), "int4", "cpu", str(work / "cache"))
    create_model(*asked, **parse_extra_options(*asked, []))
    runtime = onnxruntime.InferenceSession(out / "model.onnx")
    feed = {one.name: np.zeros((1, 2, 0, 32), np.float32) for one in runtime.get_inputs() if "past" in one.name}
    logits = runtime.run(["logits"], feed | {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())})[0]
    true = model(ids).logits.detach().numpy()
    graph = onnx.load(out / "model.onnx").graph
    (zeros,) = (one for one in graph.initializer if one.name.endswith("layers.0.mlp.down_proj.MatMulNBits.qzeros"))
    read = onnx.numpy_helper.to_array(zeros).reshape(-1)
    read = np.stack((read & 15, read >> 4), -1).reshape(-1) if bits == 4 else read
    return float(((logits - true) ** 2).sum() / (true**2).sum()), np.unique(read).tolist()


print("FOUND", {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}, "squared error of the logits")
for bits in (4, 8):
    for symmetric in (True, False):
        first, second = (built(bits, symmetric, stored) for stored in (1, 2))
        points = f"zero points {first[1]} and {second[1]}" if symmetric else "various zero points"
        print(f"FOUND {bits} bits, {points}: version 1 {first[0]:.4f}, version 2 {second[0]:.4f}")
        assert first[0] < 0.02
        assert second[0] > (1 if bits == 4 else 1.5 * first[0]), "version 2 is read as it is stored now"
        if symmetric:
            assert first[1] == [2 ** (bits - 1)] and second[1] == [2 ** (bits - 1) + 1]
PY
sed -n 's/^FOUND //p' "$work/found"
