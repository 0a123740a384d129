"""End-to-end tuning of scales against the float model's predictions."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from bitmill.models.streamed import set_weight
from bitmill.quant.tensors import Quantized, QuantizedWeight
from bitmill.refinement.omniquant.end_to_end import TuneSettings, final_hidden, tune_scales
from learning import starts, tiny


def whole_model() -> dict[str, QuantizedWeight]:
    blocks = range(tiny().model.block_count)
    return {name: w for index in blocks for name, w in starts(index, (2, 3)).items()}


def kl(weights: Mapping[str, Quantized], tokens: torch.Tensor) -> float:
    """Mean KL per token, the obvious way."""
    model = tiny().model
    hidden = model.embed(tokens)
    for index in range(model.block_count):
        block = model.load_block(index)
        for name, module in model.linears(block, index).items():
            set_weight(module, weights[name].dequantize())
        hidden = model.run_block(index, block, hidden)
    p = model.logits(final_hidden(model, tokens)).log_softmax(-1)
    q = model.logits(hidden).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_scales_alone_lower_the_held_out_kl_and_codes_stay() -> None:
    weights, data = whole_model(), tiny()
    settings = TuneSettings(steps=24, batch=4, scale_rate=3e-3)
    made = tune_scales(data.model, weights, data.tokens, data.held_out, settings, seed=0)
    tuned, report = made.weights, made.report
    assert not made.vectors
    assert report.kept
    assert kl(tuned, data.held_out) == pytest.approx(report.kl_after, rel=1e-3)
    assert kl(weights, data.held_out) == pytest.approx(report.kl_before, rel=1e-3)
    assert report.kl_after < report.kl_before
    for name, weight in weights.items():
        assert torch.equal(tuned[name].codes, weight.codes)
        assert torch.equal(tuned[name].zeros, weight.zeros)
        assert not torch.equal(tuned[name].scales, weight.scales)


def test_other_texts_are_measured_and_decide_nothing() -> None:
    weights, data = whole_model(), tiny()
    settings = TuneSettings(steps=8, batch=4, scale_rate=3e-3)
    other = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(9))
    arguments = data.model, weights, data.tokens, data.held_out, settings
    plain = tune_scales(*arguments, seed=0).weights
    made = tune_scales(*arguments, seed=0, texts={"other": other})
    tuned, report = made.weights, made.report
    assert report.kept
    expected = kl(weights, other), kl(tuned, other)
    assert report.texts["other"] == pytest.approx(expected, rel=1e-3)
    assert all(torch.equal(tuned[name].scales, plain[name].scales) for name in weights)


def test_scales_that_do_not_help_are_not_kept() -> None:
    weights, data = whole_model(), tiny()
    settings = TuneSettings(steps=4, batch=4, scale_rate=10.0)
    made = tune_scales(data.model, weights, data.tokens, data.held_out, settings, seed=0)
    tuned, report = made.weights, made.report
    assert not made.vectors
    assert not report.kept
    assert report.kl_after == report.kl_before
    for name, weight in weights.items():
        assert torch.equal(tuned[name].scales, weight.scales)
