"""vLLM against `bitmill.load` on the same packed folders: tokens, log-probabilities, refusals.

One process imports vLLM once, which is most of the time.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: errors arrive as they are
sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))

import pytest
import torch
import vllm
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.distributed import cleanup_dist_env_and_memory

import bitmill
from tiny import tiny_llama
from trellis_models import pack_trellis
from weights import pack_model

LIMIT = 1e-5
"""Of a log-probability, in fp32."""
MODELS: dict[str, dict[str, Any]] = {
    "own widths, natural order": {},
    "tied packed embedding, orders": {"order": "activation", "embeddings": "quantize"},
    "packed embedding and head": {"embeddings": "quantize", "tied": False},
    "one width": {"order": "activation", "cycle": (4,)},
}


def packed_model(
    folder: Path, *, tied: bool = True, intermediate: int = 448, **options: Any
) -> Path:
    """Two blocks whose linears have tails: hidden 160, attention 256."""
    source = tiny_llama(
        folder / "source", head_dim=64, intermediate_size=intermediate, tie_word_embeddings=tied
    )
    return pack_model(source, folder / "packed", **options).folder


def generated(folder: Path, **options: Any) -> list[Any]:
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 2}
    llm = vllm.LLM(str(folder), **(settings | options))
    params = vllm.SamplingParams(
        temperature=0, max_tokens=24, logprobs=0, prompt_logprobs=0, ignore_eos=True
    )
    try:
        return llm.generate(["The river crosses", "In 1905", "x"], params)
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def compare(folder: Path, outputs: list[Any], name: str) -> None:
    """Greedy tokens are equal; prints the largest difference of a log-probability."""
    model, largest = bitmill.load(folder).eval(), 0.0
    for output in outputs:
        prompt, new = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
        steps = output.prompt_logprobs[1:] + output.outputs[0].logprobs
        ids = prompt + new
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        assert expected[len(prompt) - 1 : -1].argmax(-1).tolist() == new
        for position, (token, step) in enumerate(zip(ids[1:], steps, strict=True)):
            largest = max(largest, abs(expected[position, token].item() - step[token].logprob))
    print(f"{name}: {sum(len(o.outputs[0].token_ids) for o in outputs)} tokens, {largest:.1e}")  # noqa: T201
    assert largest < LIMIT


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_bitmill(tmp_path: Path, name: str) -> None:
    folder = packed_model(tmp_path, **MODELS[name])
    compare(folder, generated(folder), name)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "with a head"])
@pytest.mark.parametrize("embeddings", ["keep", "quantize"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_trellis_codes(tmp_path: Path, eager: bool, embeddings: Any, tied: bool) -> None:
    sizes = {"head_dim": 64, "intermediate_size": 448, "tie_word_embeddings": tied}
    source = tiny_llama(tmp_path / "source", **sizes)
    folder = pack_trellis(source, tmp_path / "packed", embeddings)
    compare(folder, generated(folder, enforce_eager=eager), f"trellis codes, eager {eager}")


def test_compiled(tmp_path: Path) -> None:
    folder = packed_model(tmp_path, order="activation", embeddings="quantize")
    compare(folder, generated(folder, enforce_eager=False), "compiled")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("two ranks, orders and tails", {"order": "activation", "embeddings": "quantize"}),
        ("two ranks, whole groups", {"intermediate": 512}),
    ],
)
def test_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = packed_model(tmp_path, **options)
    compare(folder, generated(folder, tensor_parallel_size=2), name)


BLOCK = "model.layers.0.self_attn"
BROKEN: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "model.norm.weight": lambda t: t.pop("model.norm.weight"),
    f"{BLOCK}.k_proj.scales": lambda t: t.pop(f"{BLOCK}.k_proj.scales"),
    f"{BLOCK}.o_proj.bias": lambda t: t.update({f"{BLOCK}.o_proj.bias": torch.zeros(160)}),
    f"{BLOCK}.q_proj.codes_b1_p1": lambda t: t.update(
        {f"{BLOCK}.q_proj.codes_b1_p1": torch.zeros(1, dtype=torch.uint8)}
    ),
    f"{BLOCK}.v_proj.scales": lambda t: t[f"{BLOCK}.v_proj.scales"][0].fill_(float("nan")),
    f"{BLOCK}.q_proj.order": lambda t: t[f"{BLOCK}.q_proj.order"].fill_(0),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused_by_the_tensors_name(tmp_path: Path, name: str) -> None:
    folder = packed_model(tmp_path, order="activation")
    tensors = load_file(folder / "model.safetensors")
    BROKEN[name](tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match=name.replace(".", r"\.")):
        generated(folder)
