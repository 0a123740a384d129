"""Activations and caches of few bits, beside whole models of transformers that round the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from bitmill.config.rounded import rounded_baselines
from bitmill.evaluation.activations.grids import fp8_tokens, rounded_tokens, symmetric_tokens
from bitmill.evaluation.logits import StreamedLogits
from bitmill.evaluation.rounded import rounding
from streaming import streamed, token_windows
from tiny import save_tiny
from tiny_architectures import COVERED, tiny_config


class RoundedCache(DynamicCache):
    """Keeps what rounding leaves of keys and values."""

    bits = 4

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        rounded = (rounded_tokens(one, self.bits) for one in (keys, values))
        return super().update(*rounded, *args, **kwargs)


def logits(folder: Path, baseline: str | None, tokens: Tensor) -> Tensor:
    """Of all positions, block by block."""
    model = streamed(folder)
    change = None if baseline is None else rounding(rounded_baselines()[baseline])

    def replace(i: int, block: torch.nn.Module) -> None:
        if change is not None:
            change(model, i, block)

    found = StreamedLogits(model, replace=replace).windows(tokens)
    return torch.stack([window(0, tokens.shape[1]) for window in found])


def test_each_token_has_a_grid_of_its_own() -> None:
    x = torch.tensor([[0.0, 1, 2, 3], [-30, -10, 0, 30], [5, 5, 5, 5], [0, 0.4, 0.6, 3]])
    expected = torch.tensor([[0.0, 1, 2, 3], [-30, -10, 10, 30], [5, 5, 5, 5], [0, 0, 1, 3]])
    assert torch.equal(rounded_tokens(x, 2), expected)
    x = torch.randn(3, 7, 33, generator=torch.Generator().manual_seed(0))
    step = (x.amax(-1) - x.amin(-1)) / 255
    assert ((rounded_tokens(x, 8) - x).abs().amax(-1) <= 0.51 * step).all()
    assert rounded_tokens(x.half(), 8).dtype == torch.float16


def test_symmetric_grids_lie_around_zero() -> None:
    x = torch.tensor([[7.0, -3.4, 0.6, 0.4], [0.0, 0, 0, 0], [-70, 14, 6, 4]])
    expected = torch.tensor([[7.0, -3, 1, 0], [0, 0, 0, 0], [-70, 10, 10, 0]])
    assert torch.equal(symmetric_tokens(x, 4), expected)
    assert symmetric_tokens(x.half(), 4).dtype == torch.float16


def test_fp8_keeps_three_bits_behind_the_first() -> None:
    x = torch.tensor([[448.0, 17, 1.06, 0.003, 0.0009], [0, 0, 0, 0, 0], [-44.8, 1.7, 0.1, 0, 0]])
    expected = torch.tensor([[448, 16, 1, 2.0**-8, 0], [0, 0, 0, 0, 0], [-44.8, 1.6, 0.1, 0, 0]])
    torch.testing.assert_close(fp8_tokens(x), expected, rtol=0.03, atol=0)
    assert fp8_tokens(x)[:2].tolist() == expected[:2].tolist()
    assert fp8_tokens(x.half()).dtype == torch.float16


def test_activations_are_those_of_every_linear(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", tiny_config("llama"))
    tokens = token_windows(2)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    for linear in streamed(folder).plan.linears:
        whole.get_submodule(linear.name).register_forward_pre_hook(
            lambda _, args: (rounded_tokens(args[0], 4),)
        )
    with torch.no_grad():
        expected = whole(tokens, use_cache=False).logits
    torch.testing.assert_close(logits(folder, "activations-4", tokens), expected)
    assert (logits(folder, None, tokens) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", COVERED)
def test_caches_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    folder = save_tiny(tmp_path / "m", tiny_config(model_type))
    tokens = token_windows(1, T=24)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        plain = whole(tokens, use_cache=False).logits
        expected = whole(tokens, past_key_values=RoundedCache(), use_cache=True).logits
    found = logits(folder, "cache-4", tokens)
    assert (plain - expected).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
