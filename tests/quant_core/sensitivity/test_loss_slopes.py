from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitmill.allocation.profile import LinearProfile, SensitivityProfile
from bitmill.calibration.gradients import PassSettings
from bitmill.config.quantization import parse_config
from bitmill.models.streamed import StreamedModel, set_weight, weight_of
from bitmill.plan.model_plan import make_plan
from bitmill.quant.codes import group_slices
from bitmill.quant.grid import ClipSettings, clip_search, nearest_codes, values
from bitmill.sensitivity.loss_slopes import corrected, loss_slopes
from tiny import VOCABULARY, tiny_llama

SPEC = parse_config({"budget": {"code_bits": 3}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model")


def rounded(W: Tensor) -> Tensor:
    """W at 2 bits per group, min-max grid."""
    parts = []
    for _, part in group_slices(W.shape[1]):
        block = W[:, part].float().contiguous()
        grid = clip_search(block, 2, settings=ClipSettings.min_max())
        parts.append(values(nearest_codes(block, grid, 2), grid))
    return torch.cat(parts, 1)


def test_slopes_are_derivatives_of_the_divergence(folder):
    plan = make_plan(folder, SPEC)
    model = StreamedModel(folder, plan, device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.randint(0, VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(3))

    def quantize(i: int, block: nn.Module) -> None:
        for module in model.linears(block, i).values():
            set_weight(module, rounded(weight_of(module)))

    settings = PassSettings(batch=2, labels="source")
    slopes = loss_slopes(model, tokens, quantize, settings)
    assert list(slopes) == [s.name for b in (1, 0) for s in plan.block_linears(b)]

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        source = whole(tokens).logits[:, :-1].log_softmax(-1)
        original = {name: whole.get_submodule(name).weight.clone() for name in plan.by_name}
        for name, W in original.items():
            whole.get_submodule(name).weight.copy_(rounded(W))

        def divergence(name: str, a: float) -> float:
            module = whole.get_submodule(name)
            W = original[name]
            module.weight.copy_(W + a * (rounded(W).double() - W))
            changed = whole(tokens).logits[:, :-1].log_softmax(-1)
            module.weight.copy_(rounded(W))
            return float((source.exp() * (source - changed)).sum(-1).mean())

        for name in plan.by_name:
            expected = (divergence(name, 1.001) - divergence(name, 0.999)) / 0.002
            assert slopes[name] == pytest.approx(expected, rel=0.02, abs=1e-6)


def profile_of(costs: dict[str, float]) -> SensitivityProfile:
    linears = tuple(
        LinearProfile(name, 4, 256, np.full((2, 2), cost)) for name, cost in costs.items()
    )
    return SensitivityProfile("m", "c", {"widths": "2 3"}, (2, 3), linears)


def test_corrected_costs_reproduce_the_slopes():
    profile = profile_of({"a": 1.0, "b": 2.0, "c": 3.0})
    widths = {name: (2, 3) for name in "abc"}
    slopes = {"a": 6.0, "b": 8.0, "c": 3.0}
    found = corrected(profile, widths, slopes)
    for name in "abc":
        assert 2 * found.predicted_loss({name: (2, 3)}) == pytest.approx(slopes[name])
    assert found.key != profile.key
    half = corrected(profile, widths, slopes, strength=0.5)
    assert half.linear("a").costs[0, 0] == pytest.approx(1.5**0.5)


def test_corrections_are_bounded_around_their_median():
    profile = profile_of(dict.fromkeys("abcde", 1.0))
    widths = {name: (2, 2) for name in "abcde"}
    slopes = {"a": 4.0, "b": 4.0, "c": 4.0, "d": 400.0, "e": -1.0}
    found = corrected(profile, widths, slopes)
    first = [found.linear(name).costs[0, 0] for name in "abcde"]
    assert first == pytest.approx([1.0, 1.0, 1.0, 4.0, 0.25])
