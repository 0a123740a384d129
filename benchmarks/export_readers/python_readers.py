"""One library of another runtime on one exported folder: what it computes, in files.

    PYTHON benchmarks/export_readers/python_readers.py LIBRARY FOLDER REQUEST OUT

PYTHON has the library (transformers, compressed_tensors, gptqmodel, mlx, vllm, exllamav2; exl2 is
read by torch and transformers) and numpy. REQUEST is JSON: `prompts`, lists of token ids of one
length, and `new`, how many tokens follow greedily. OUT gets `tokens.json` (the tokens of each
prompt), `0.f32`, `1.f32`, ... (log-probabilities [T, V] behind every token of a prompt,
little-endian), `weights.safetensors` (quantized weights as the library dequantizes them, by their
names in the folder; not from vLLM, which keeps none) and `library.txt`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Read = tuple[list[list[int]], list[Any], dict[str, Any]]
"""Tokens of each prompt, log-probabilities f32 [T, V] of each, weights."""


def transformers(folder: Path, prompts: Sequence[list[int]], new: int) -> Read:
    """Plain folders, pack-quantized ones and GGUF files."""
    import torch
    from transformers import AutoModelForCausalLM

    files = [file.name for file in folder.glob("*.gguf")]
    options: dict[str, Any] = {"gguf_file": files[0]} if files else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    tokens, scores = _torch_reads(model, prompts, new)
    linears = {
        name: module.weight.detach().float().numpy()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    return tokens, scores, linears


def compressed_tensors(folder: Path, prompts: Sequence[list[int]], new: int) -> Read:
    """Weights of pack-quantized folders, by the decompressor of the format's own library."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    stored: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    linears = {}
    for scheme in QuantizationConfig.model_validate(config).config_groups.values():
        for name in scheme.targets:
            keys = [key for key in stored if key.startswith(f"{name}.weight_")]
            local = {key.removeprefix(f"{name}."): stored[key] for key in keys}
            local["weight_scale"] = local["weight_scale"].float()
            linears[name] = PackedQuantizationCompressor.decompress(local, scheme)["weight"].numpy()
    return [], [], linears


def gptqmodel(folder: Path, prompts: Sequence[list[int]], new: int) -> Read:
    """GPTQ folders, by its kernel in torch, in 16 bits; weights as it dequantizes them in fp16."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # it would compile every linear by itself
    import torch
    from gptqmodel import BACKEND, GPTQModel

    options = {"device": "cpu", "backend": BACKEND.TORCH}
    model = GPTQModel.load(str(folder), dtype=torch.float16, **options).model.eval()
    linears = {
        name: module.dequantize_weight().T.contiguous().numpy()
        for name, module in model.named_modules()
        if hasattr(module, "dequantize_weight")
    }
    if (dtype := _half(folder)) != "float16":
        model = GPTQModel.load(str(folder), dtype=getattr(torch, dtype), **options).model.eval()
    tokens, scores = _torch_reads(model, prompts, new)
    return tokens, scores, linears


def _half(folder: Path) -> str:
    """16 bits that the model's activations fit: those of Gemma are beyond fp16."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return "bfloat16" if kind.startswith("gemma") else "float16"


def _torch_reads(model: Any, prompts: Sequence[list[int]], new: int) -> tuple[Any, Any]:
    import torch

    with torch.no_grad():
        out = model(torch.tensor(prompts), use_cache=True)
        scores = list(out.logits.float().log_softmax(-1).numpy())
        tokens = [out.logits[:, -1].argmax(-1)]
        while len(tokens) < new:
            out = model(tokens[-1][:, None], past_key_values=out.past_key_values)
            tokens.append(out.logits[:, -1].argmax(-1))
    return torch.stack(tokens, 1).tolist(), scores


def exl2(folder: Path, prompts: Sequence[list[int]], new: int) -> Read:
    """exl2 folders, whose own runtime needs CUDA: weights by the layout of ExLlamaV2, scales in
    fp16 as its kernel has them, their products with codes in fp32; transformers computes."""
    import torch
    from exl2_layout import weight
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    stored: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    stored = {name.removeprefix("language_model."): t for name, t in stored.items()}
    names = [key.removesuffix(".q_weight") for key in stored if key.endswith(".q_weight")]
    linears = {
        name: weight(
            *(stored.pop(f"{name}.q_{key}") for key in ("weight", "groups", "scale", "scale_max"))
        )[:, stored.pop(f"{name}.q_invperm").long()].contiguous()
        for name in names
    }
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {f"{name}.weight": found for name, found in linears.items()}
    missing, unknown = model.load_state_dict(weights | stored, strict=False)
    assert not unknown, unknown
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    tokens, scores = _torch_reads(model, prompts, new)
    return tokens, scores, {name: found.numpy() for name, found in linears.items()}


def exllamav2(folder: Path, prompts: Sequence[list[int]], new: int) -> Read:
    """exl2 folders, by exllamav2's own loader and model, in fp16 on a CPU."""
    import torch
    from exl2_layout import weight
    from exllamav2_on_cpu import load

    logits, linears = load(folder, weight)
    tokens = torch.tensor(prompts)
    scores = logits(tokens).float().log_softmax(-1)
    with torch.no_grad():
        while tokens.shape[1] < len(prompts[0]) + new:
            tokens = torch.cat([tokens, logits(tokens)[:, -1:].argmax(-1)], 1)
    found = tokens[:, len(prompts[0]) :].tolist()
    return found, list(scores.numpy()), {name: one.numpy() for name, one in linears.items()}


def mlx(folder: Path, prompts: Sequence[list[int]], new: int) -> Read:
    """Affine folders, by mlx-lm; dequantized by mlx."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    linears = {
        name: mx.dequantize(
            module.weight, module.scales, module.biases, module.group_size, module.bits
        )
        for name, module in model.named_modules()
        if hasattr(module, "scales")
    }
    cache = make_prompt_cache(model)
    logits = model(mx.array(prompts), cache=cache).astype(mx.float32)
    scores = list(np.array(logits - mx.logsumexp(logits, -1, keepdims=True)))
    tokens = [logits[:, -1].argmax(-1)]
    while len(tokens) < new:
        tokens.append(model(tokens[-1][:, None], cache=cache)[:, -1].argmax(-1))
    return mx.stack(tokens, 1).tolist(), scores, {k: np.array(v) for k, v in linears.items()}


def vllm(folder: Path, prompts: Sequence[list[int]], new: int, *, rounds: bool = False) -> Read:
    """Whatever vLLM takes, on a CPU in fp32, in bf16 what its own kernels multiply and what is
    stored plainly in bf16. Of the first prompt alone it is asked for every token's log-probability,
    since its answers hold them as Python's own numbers. rounds: lets it round activations to 8 bits
    before products with 4-bit weights, as is its default; it does so on a CPU with AMX, and on one
    of AMD with zentorch."""
    os.environ["VLLM_CPU_INT4_W4A8"] = str(int(rounds))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import numpy as np
    from vllm import LLM, SamplingParams

    config = json.loads((folder / "config.json").read_text())
    plain = config.get("torch_dtype", config.get("dtype"))
    method = config.get("quantization_config", {}).get("quant_method", plain)
    engine = LLM(
        str(folder),
        dtype="bfloat16" if method in (*WNA16, "bfloat16") else "float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        max_logprobs=-1,
    )
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    tokens = [list(one.outputs[0].token_ids) for one in engine.generate(asked, greedy)]
    scores = []
    for prompt in asked[:1]:
        every = SamplingParams(
            temperature=0, max_tokens=1, logprobs=-1, prompt_logprobs=-1, flat_logprobs=True
        )
        (found,) = engine.generate([prompt], every)
        steps = [*found.prompt_logprobs[1:], *found.outputs[0].logprobs]
        rows = []
        for step in steps:
            row = np.empty(len(step), np.float32)
            row[list(step)] = [one.logprob for one in step.values()]
            rows.append(row)
        scores.append(np.stack(rows))
    return tokens, scores, {}


WNA16 = ("compressed-tensors", "gptq")
"""Methods whose products on a CPU vLLM has in bf16 alone."""
READERS: dict[str, Callable[[Path, Sequence[list[int]], int], Read]] = {
    "transformers": transformers,
    "compressed_tensors": compressed_tensors,
    "gptqmodel": gptqmodel,
    "exl2": exl2,
    "exllamav2": exllamav2,
    "mlx": mlx,
    "vllm": vllm,
    "vllm, VLLM_CPU_INT4_W4A8=1": partial(vllm, rounds=True),
}


def main(library: str, folder: str, request: str, out: str) -> None:
    """Read one folder."""
    from importlib.metadata import version
    from importlib.util import find_spec

    asked, made = json.loads(Path(request).read_text()), Path(out)
    tokens, scores, weights = READERS[library](Path(folder), asked["prompts"], asked["new"])
    for i, score in enumerate(scores):
        (made / f"{i}.f32").write_bytes(score.astype("<f4").tobytes())
    if weights:
        from safetensors.numpy import save_file

        save_file(weights, made / "weights.safetensors")
    distribution = "torch" if library == "exl2" else library.partition(",")[0]
    named = f"{distribution} {version(distribution)}"
    if distribution == "vllm" and find_spec("zentorch"):
        named += f", zentorch {version('zentorch')}"
    (made / "library.txt").write_text(named)
    if tokens:
        (made / "tokens.json").write_text(json.dumps(tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
