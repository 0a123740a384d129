"""Perplexity, KL and agreement against direct formulas, and bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitmill.config.quantization import parse_config
from bitmill.errors import NumericalError
from bitmill.evaluation.logits import StreamedLogits, Window, perplexity_and_kl
from bitmill.models.streamed import StreamedModel, set_weight, weight_of
from bitmill.plan.model_plan import make_plan
from tiny import VOCABULARY, tiny_llama, tiny_opt

SPEC = parse_config({"budget": {"code_bits": 3}})


def some_tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(3))


class TableModel:
    """Next-token logits are a row of a random table: a model whose figures are easy to check."""

    def __init__(self, seed: int) -> None:
        self.table = 3 * torch.randn(
            VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)
        )

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    def windows(self, tokens: Tensor) -> Iterator[Window]:
        for row in tokens:
            yield lambda begin, end, row=row: self(row[begin:end])


class WholeModel:
    """A transformers model, run window by window."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def windows(self, tokens: Tensor) -> Iterator[Window]:
        for row in tokens:
            logits = self.model(row[None]).logits[0]
            yield lambda begin, end, logits=logits: logits[begin:end]


def test_measures_equal_direct_formulas_for_any_chunk() -> None:
    p, q, tokens = TableModel(0), TableModel(1), some_tokens(3, 150)
    log_p = p(tokens)[:, :-1].double().log_softmax(-1)
    log_q = q(tokens)[:, :-1].double().log_softmax(-1)
    nll = -log_q.gather(-1, tokens[:, 1:, None])[..., 0].mean(-1)
    source_nll = -log_p.gather(-1, tokens[:, 1:, None])[..., 0].mean(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean(-1)
    for chunk in (1, 7, 100, 500):
        measured = perplexity_and_kl(p, q, tokens, chunk=chunk)
        assert torch.allclose(measured.nll, nll, atol=1e-5)
        assert torch.allclose(measured.source_nll, source_nll, atol=1e-5)
        assert torch.allclose(measured.kl, kl, atol=1e-5)
        assert torch.allclose(measured.agreement, agreement)
    assert 0 < float(agreement.mean()) < 0.5 < float(kl.mean())
    quality = measured.candidate()
    assert quality.perplexity == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    error = float(nll.std() / math.sqrt(3))
    assert quality.perplexity_se == pytest.approx(quality.perplexity * error, rel=1e-4)
    assert quality.kl_se == pytest.approx(float(kl.std() / math.sqrt(3)), rel=1e-4)
    assert (quality.windows, quality.tokens) == (3, 450)
    assert measured.source().perplexity == pytest.approx(math.exp(source_nll.mean()), rel=1e-5)


def test_a_model_against_itself_has_no_divergence() -> None:
    measured = perplexity_and_kl(TableModel(0), TableModel(0), some_tokens(2, 16)).candidate()
    assert measured.kl == pytest.approx(0, abs=1e-7)
    assert measured.top1_agreement == 1


def test_one_window_has_no_standard_error() -> None:
    quality = perplexity_and_kl(None, TableModel(0), some_tokens(1, 16)).candidate()
    assert (quality.perplexity_se, quality.kl, quality.top1_agreement) == (0, 0, 1)


def test_overflowing_outputs_are_a_numerical_error() -> None:
    broken = TableModel(0)
    broken.table[5] = float("nan")
    tokens = some_tokens(3, 16)
    tokens[1, 4] = 5
    tokens[[0, 2]] = tokens[[0, 2]].clamp(min=6)
    with pytest.raises(NumericalError, match="first in window 1 of 3"):
        perplexity_and_kl(None, broken, tokens).candidate()


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_streamed_model_gives_the_loss_of_transformers(make: object, tmp_path: Path) -> None:
    assert callable(make)
    folder = make(tmp_path / "model")
    plan = make_plan(folder, SPEC)
    model = StreamedModel(folder, plan, device=torch.device("cpu"), dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens, blocks, windows = some_tokens(3, 40), [], []
    measured = perplexity_and_kl(
        WholeModel(reference),
        StreamedLogits(model, on_block=lambda i, n: blocks.append((i, n))),
        tokens,
        on_window=lambda i, n: windows.append((i, n)),
    )
    with torch.no_grad():
        expected = [float(reference(row[None], labels=row[None]).loss) for row in tokens]
    assert torch.allclose(measured.nll, torch.tensor(expected, dtype=torch.float64), atol=1e-5)
    assert float(measured.kl.abs().max()) < 1e-6
    assert blocks == [(1, 2), (2, 2)]
    assert windows == [(1, 3), (2, 3), (3, 3)]


def test_replaced_weights_are_what_is_measured(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model")
    plan = make_plan(folder, SPEC)
    model = StreamedModel(folder, plan, device=torch.device("cpu"), dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        reference.get_submodule(name).weight.mul_(-2)

    def replace(i: int, block: torch.nn.Module) -> None:
        for full, module in model.linears(block, i).items():
            if full == name:
                set_weight(module, -2 * weight_of(module))

    measured = perplexity_and_kl(
        StreamedLogits(model, replace=replace), WholeModel(reference), some_tokens(2, 9)
    )
    assert float(measured.kl.abs().max()) < 1e-6
    plain = perplexity_and_kl(StreamedLogits(model), WholeModel(reference), some_tokens(2, 9))
    assert float(plain.kl.min()) > 1e-4
