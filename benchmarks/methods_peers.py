"""Float weights of models that other packages quantized, for `methods.py --folder`.

    python benchmarks/methods_peers.py hqq SOURCE TARGET --bits 4 --group 64
    python benchmarks/methods_peers.py awq SOURCE TARGET --bits 4 --group 128 --calibration 64 2048

`hqq` wants the package hqq 0.2.8, `awq` llmcompressor 0.14, each in an environment of its own with
Bitmill on PYTHONPATH for the windows. Prints the true bits: codes, scales and zero points.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from bitmill.calibration.windows import calibration_tokens
from bitmill.config.quantization import Calibration


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Those of the decoder blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def hqq(model: nn.Module, options: argparse.Namespace) -> float:
    """HQQ with its own defaults; scales and zero points are float16."""
    from hqq.core.quantize import Quantizer, hqq_base_quant_config

    settings = hqq_base_quant_config(nbits=options.bits, group_size=options.group, axis=1)
    for linear in linears(model).values():
        codes, meta = Quantizer.quantize(
            linear.weight.data,
            device="cpu",
            compute_dtype=torch.float32,
            bitpack=False,
            **settings["weight_quant_params"],
        )
        values = Quantizer.dequantize(codes, meta)
        linear.weight.data = values.float().reshape(linear.weight.shape)
    return options.bits + 32 / options.group


def awq(model: nn.Module, options: argparse.Namespace) -> float:
    """llm-compressor's AWQ, asymmetric, with its default search; float16 scales."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    count, length = options.calibration
    wanted = Calibration(sequences=count, length=length, held_out=0)
    tokens = calibration_tokens(wanted, options.source, seed=0).tokens
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    weights = QuantizationArgs(
        num_bits=options.bits,
        type="int",
        symmetric=False,
        strategy="group",
        group_size=options.group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    if not torch.cuda.is_available():  # it pins host memory even where there is no accelerator
        torch.Tensor.pin_memory = lambda tensor, *_: tensor
    quantization = QuantizationModifier(config_groups={"all": scheme}, ignore=["lm_head"])
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=[AWQModifier(), quantization],
        max_seq_length=length,
        num_calibration_samples=count,
        pipeline="sequential",
    )
    for linear in linears(model).values():
        grouped = linear.weight.data.float().unflatten(1, (-1, options.group))
        scale = linear.weight_scale.data.half().float()[..., None]
        zero = linear.weight_zero_point.data.float()[..., None]
        least, most = -(2 ** (options.bits - 1)), 2 ** (options.bits - 1) - 1
        codes = (grouped / scale + zero).round().clamp(least, most)
        linear.weight.data = (scale * (codes - zero)).flatten(1)
    return options.bits + (16 + options.bits) / options.group


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", choices=("hqq", "awq"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--calibration", type=int, nargs=2, default=(64, 2048))
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.float32).eval()
    started = time.perf_counter()
    with torch.no_grad():
        bits = {"hqq": hqq, "awq": awq}[options.package](model, options)
    taken = time.perf_counter() - started
    options.target.mkdir(parents=True)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(("_scale", "_point"))}
    state = {name: value.float().contiguous().clone() for name, value in state.items()}
    save_file(state, options.target / "model.safetensors", metadata={"format": "pt"})
    for file in options.source.glob("*.json"):
        shutil.copy(file, options.target)
    print(f"{bits:.4f} bits, {taken:.0f} s")


if __name__ == "__main__":
    main()
