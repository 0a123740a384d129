"""Speed of a packed folder on this machine, next to the same model with dequantized weights.

Prefill is one forward pass over the prompt. Decode is one token at a time, batch 1, after it: on
CUDA one step over a static cache, captured in a CUDA graph and replayed, so that neither model
waits for Python; elsewhere, or where the model cannot be captured, plain steps, and the report
says so. Medians count. The dense twin has the shapes, and so the speed, of the source model in
that dtype.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from bitmill.errors import InputError
from bitmill.inference.load import load
from bitmill.inference.positions import check_positions
from bitmill.runtime.device import device_of

_LOG = logging.getLogger(__name__)
_WARM_UP = 3


@dataclass(frozen=True)
class Speed:
    """What one model did. peak_bytes: of the accelerator, or of this process on a CPU."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_bytes: int
    graph: bool


def bench(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    prompt_tokens: int = 512,
    new_tokens: int = 32,
) -> dict[str, Any]:
    """Speeds of the packed model and of its dense twin, and their ratios.

    Returns {"packed": …, "dense": …, "decode_speedup", "prefill_speedup", "memory_ratio"}.
    Raises InputError for fewer than one token, FormatError where the folder cannot be loaded.
    """
    if prompt_tokens < 1 or new_tokens < 1:
        raise InputError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens: give at least one of each"
        )
    place = device_of(device)
    model = load(folder, device=place, dtype=dtype)
    check_positions(model, prompt_tokens + new_tokens + 1, "prompt_tokens + new_tokens + 1")
    packed = _measure(model, place, prompt_tokens, new_tokens)
    del model
    twin = load(folder, dtype=dtype)
    dense = _measure(twin.dequantize().to(place), place, prompt_tokens, new_tokens)
    return {
        "packed": asdict(packed),
        "dense": asdict(dense),
        "decode_speedup": packed.decode_tokens_per_second / dense.decode_tokens_per_second,
        "prefill_speedup": packed.prefill_tokens_per_second / dense.prefill_tokens_per_second,
        "memory_ratio": packed.peak_bytes / dense.peak_bytes,
    }


@torch.inference_mode()
def _measure(model: Any, device: torch.device, prompt_tokens: int, new_tokens: int) -> Speed:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prompt = (torch.arange(prompt_tokens, device=device) % model.config.vocab_size)[None]
    prefill = median(_times(lambda: model(prompt, logits_to_keep=1), 3, device))
    decode, graph = _decode_time(model, prompt, new_tokens, device)
    return Speed(prompt_tokens / prefill, 1 / decode, _peak_bytes(device), graph)


def _decode_time(
    model: Any, prompt: Tensor, new_tokens: int, device: torch.device
) -> tuple[float, bool]:
    """(median seconds of one step, whether it was a replayed graph)."""
    if device.type == "cuda":
        try:
            return median(_times(_captured_step(model, prompt), new_tokens, device)), True
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            _LOG.warning("the decode step cannot be captured in a CUDA graph: %s", reason)
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    token = prompt[:, -1:]

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True)

    return median(_times(step, new_tokens, device)), False


def _captured_step(model: Any, prompt: Tensor) -> Callable[[], None]:
    """One decode step behind `prompt`, as a graph; every replay computes the same step."""
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + 64)
    model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = prompt[:, -1:].clone()
    position = torch.tensor([[prompt.shape[1]]], device=prompt.device)

    def step() -> None:
        model(token, past_key_values=cache, use_cache=True, position_ids=position)

    for _ in range(_WARM_UP):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _times(call: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of `repeats` calls after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
