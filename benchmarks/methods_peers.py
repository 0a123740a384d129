"""Models that other packages quantized, as float weights, for the rows of `methods.py`.

    python benchmarks/methods_peers.py hqq SOURCE TARGET --bits 4
    python benchmarks/methods_peers.py llmcompressor-awq SOURCE TARGET --bits 4 --device cuda
    python benchmarks/methods_peers.py llmcompressor-smoothquant SOURCE TARGET --bits 8

`hqq` wants the package hqq 0.2.8, the others llmcompressor 0.14, with Bitmill on PYTHONPATH for the
calibration windows. hqq has its own default, groups of 64; the others asymmetric groups of 128, or
64 where the model has columns that are no multiple, `llmcompressor-smoothquant` its scheme W8A8
(a symmetric scale for each row of the weights) behind SmoothQuant of strength 0.5. TARGET gets
`model.safetensors` (float32) and `made.json`: true bits (codes, scales, zero points), seconds and
memory.
"""

from __future__ import annotations

import argparse
import resource
import time
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from bitmill.calibration.windows import calibration_tokens
from bitmill.config.quantization import Calibration
from bitmill.io.atomic import write_json

GEMMA_MAPPINGS = [
    [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
    [["re:.*gate_proj", "re:.*up_proj"], "re:.*pre_feedforward_layernorm"],
]
"""llm-compressor's own name a norm that does not feed the MLP of Gemma 2 and 3
(`findings/llm-compressor-smooths-the-wrong-norm-of-gemma.sh`)."""


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Those of the decoder blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def parameter(module: nn.Module, name: str) -> torch.Tensor:
    """Data of what llm-compressor has added to a module."""
    found: torch.Tensor = getattr(module, name)
    return found.data


def group_of(model: nn.Module) -> int:
    """128 where every linear's columns are a multiple, else 64."""
    return 64 if any(linear.in_features % 128 for linear in linears(model).values()) else 128


def hqq(model: nn.Module, options: argparse.Namespace) -> float:
    """HQQ with its own defaults; scales and zero points are float16."""
    from hqq.core.quantize import Quantizer, hqq_base_quant_config

    settings = hqq_base_quant_config(nbits=options.bits, group_size=64, axis=1)
    for linear in linears(model).values():
        codes, meta = Quantizer.quantize(
            linear.weight.data,
            device=options.device,
            compute_dtype=torch.float32,
            bitpack=False,
            **settings["weight_quant_params"],
        )
        values = Quantizer.dequantize(codes, meta)
        linear.weight.data = values.float().reshape(linear.weight.shape)
    return float(options.bits + 32 / 64)


def run_llmcompressor(model: nn.Module, recipe: list[Any], options: argparse.Namespace) -> None:
    """Apply a recipe of llm-compressor on the calibration windows."""
    from datasets import Dataset
    from llmcompressor import oneshot

    count, length = options.calibration
    wanted = Calibration(sequences=count, length=length, held_out=0)
    tokens = calibration_tokens(wanted, options.source, seed=0).tokens
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    with pinning():
        oneshot(
            model=model,
            dataset=Dataset.from_dict(rows),
            recipe=recipe,
            max_seq_length=length,
            num_calibration_samples=count,
            pipeline="sequential",
        )


def pinning() -> AbstractContextManager[object]:
    """llm-compressor pins host memory even where there is no accelerator to pin it for."""
    if torch.cuda.is_available():
        return nullcontext()
    return patch.object(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)


def smoothquant(model: nn.Module, options: argparse.Namespace) -> float:
    """llm-compressor's SmoothQuant, then its W8A8: each row of weights rounded to 8 bits around 0,
    activations while the model runs. Norms change too."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    mappings = None
    if any(name.endswith("pre_feedforward_layernorm") for name, _ in model.named_modules()):
        mappings = GEMMA_MAPPINGS
    smooth = SmoothQuantModifier(smoothing_strength=0.5, mappings=mappings)
    scheme = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
    run_llmcompressor(model, [smooth, scheme], options)
    own = linears(model).values()
    for linear in own:
        scale = parameter(linear, "weight_scale").float()
        codes = (linear.weight.data.float() / scale).round().clamp(-128, 127)
        linear.weight.data = codes * scale
    return 8 + 32 * sum(one.out_features for one in own) / sum(one.weight.numel() for one in own)


def llmcompressor(model: nn.Module, options: argparse.Namespace) -> float:
    """llm-compressor's AWQ with its default search, or its GPTQ with static activation order;
    asymmetric, float16 scales."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    group, learned = group_of(model), options.package == "llmcompressor-gptq"
    weights = QuantizationArgs(
        num_bits=options.bits,
        type="int",
        symmetric=False,
        strategy="group",
        group_size=group,
        actorder="static" if learned else None,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    asked: dict[str, Any] = {"config_groups": {"all": scheme}, "ignore": ["lm_head"]}
    recipe = [GPTQModifier(**asked)] if learned else [AWQModifier(), QuantizationModifier(**asked)]
    run_llmcompressor(model, recipe, options)
    least, most = -(2 ** (options.bits - 1)), 2 ** (options.bits - 1) - 1
    for linear in linears(model).values():
        grouped = linear.weight.data.float().unflatten(1, (-1, group))
        scale = parameter(linear, "weight_scale").half().float()[..., None]
        zero = parameter(linear, "weight_zero_point").float()[..., None]
        codes = (grouped / scale + zero).round().clamp(least, most)
        linear.weight.data = (scale * (codes - zero)).flatten(1)
    return float(options.bits + (16 + options.bits) / group)


MAKERS = {
    "hqq": hqq,
    "llmcompressor-awq": llmcompressor,
    "llmcompressor-gptq": llmcompressor,
    "llmcompressor-smoothquant": smoothquant,
}


def memory(device: str) -> int:
    """Most bytes that were held."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", choices=MAKERS)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--calibration", type=int, nargs=2, default=(64, 2048))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.float32)
    model = model.to(options.device).eval()
    started = time.perf_counter()
    with torch.no_grad():
        bits = MAKERS[options.package](model, options)
    taken = time.perf_counter() - started
    options.target.mkdir(parents=True, exist_ok=True)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(("_scale", "_point"))}
    state = {name: value.float().cpu().contiguous().clone() for name, value in state.items()}
    save_file(state, options.target / "model.safetensors", metadata={"format": "pt"})
    made = {
        "bits": bits,
        "seconds": round(taken, 1),
        "memory": memory(options.device),
        "package": f"{options.package.partition('-')[0]} "
        + version(options.package.partition("-")[0]),
    }
    write_json(options.target / "made.json", made)
    print(made)


if __name__ == "__main__":
    main()
