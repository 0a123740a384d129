#!/usr/bin/env bash
# compressed-tensors 0.20.0 in transformers 5.23.0: pack-quantized weights with zero points cannot be
# loaded, not even those that compressed-tensors itself has packed.
#
# For an empty model `PackedQuantizationCompressor.compress` gives `weight_packed` its packed shape, but
# leaves `weight_zero_point` as [N, groups]; files hold it packed along N, [ceil(N * bits / 32), groups].
# transformers then refuses the file for mismatched sizes. Without zero points the same model loads.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0 numpy
pip install transformers==5.23.0 compressed-tensors==0.20.0 accelerate
"$work/venv/bin/python" - <<'PY'
import json
import tempfile
from pathlib import Path

import compressed_tensors
import torch
import transformers
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file

config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
)
NAMES = [
    f"model.layers.0.{part}"
    for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]


def loads(symmetric: bool) -> str:
    """What transformers says to a checkpoint that the library itself compressed."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    stored = {"config_groups": {"group_0": {"targets": NAMES, "weights": weights, "format": "pack-quantized"}},
              "quant_method": "compressed-tensors", "format": "pack-quantized",
              "quantization_status": "compressed", "ignore": ["lm_head"]}
    scheme = QuantizationConfig.model_validate(stored).config_groups["group_0"]
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for name in NAMES:
        weight = tensors.pop(f"{name}.weight")
        local = {"weight": weight, "weight_scale": weight.abs().amax().div(8).expand(64, 2).contiguous()}
        if not symmetric:
            local["weight_zero_point"] = torch.zeros(64, 2, dtype=torch.int8)
        made = PackedQuantizationCompressor.compress(local, scheme)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in made.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        Path(folder, "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": stored}))
        try:
            transformers.LlamaForCausalLM.from_pretrained(folder)
        except RuntimeError as error:
            return f"RuntimeError: {str(error)[:80]}"
        return "loads"


transformers.logging.set_verbosity(50)
said = {kind: loads(symmetric) for kind, symmetric in (("symmetric", True), ("with zero points", False))}
print(f"compressed-tensors {compressed_tensors.__version__}, transformers {transformers.__version__}: {said}")
assert said["symmetric"] == "loads"
assert said["with zero points"] != "loads", "zero points are loaded now"
PY
