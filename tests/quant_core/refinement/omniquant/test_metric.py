"""The error that a block's learning lowers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitmill.errors import CalibrationError
from bitmill.refinement.omniquant.metric import OutputMetric, fisher_metric, gradient_moments
from learning import tiny
from streaming import Watched, token_windows
from tiny import tiny_llama


def test_the_plain_error_is_the_mean_square() -> None:
    output, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    expected = (output - target).square().mean()
    torch.testing.assert_close(OutputMetric()(output, target), expected)


def test_the_fisher_error_is_the_quadratic_form_per_token() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(4, 4, generator=generator)
    moment = factor @ factor.T
    output = torch.randn(1, 5, 4, generator=generator)
    target = torch.randn(1, 5, 4, generator=generator)
    F = 0.75 * moment / moment.diagonal().mean() + 0.25 * torch.eye(4)
    delta = (output - target)[0]
    sizes = target[0].square().mean(-1)
    expected = torch.stack([d @ F @ d / 4 / n for d, n in zip(delta, sizes, strict=True)]).mean()
    torch.testing.assert_close(fisher_metric(moment, 0.25)(output, target), expected)


def test_a_metric_of_plain_share_one_weighs_all_directions_alike() -> None:
    moment = torch.diag(torch.tensor([1.0, 100.0]))
    metric = fisher_metric(moment, 1.0)
    target = torch.ones(1, 1, 2)
    one = metric(target + torch.tensor([1.0, 0.0]), target)
    torch.testing.assert_close(one, metric(target + torch.tensor([0.0, 1.0]), target))


def test_non_finite_gradients_are_refused() -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        fisher_metric(torch.full((2, 2), torch.inf), 0.5)


def test_moments_come_from_deterministic_kernels(tmp_path: Path) -> None:
    model = Watched(tiny_llama(tmp_path / "model"))
    gradient_moments(model, token_windows(2), seed=5, batch=2)
    assert model.forward == model.backward == [True] * model.block_count


def test_moments_agree_with_one_backward_pass_through_the_whole_model() -> None:
    """The streamed pass against autograd over all blocks at once, with the same labels."""
    model, tokens = tiny().model, tiny().tokens[:2]
    streamed = gradient_moments(model, tokens, seed=5, batch=2)
    hidden = [model.embed(tokens)]
    for index in range(model.block_count):
        x = hidden[-1].requires_grad_()
        hidden.append(model.run_block(index, model.load_block(index), x))
    logits = model.logits(hidden[-1]).flatten(0, 1)
    generator = torch.Generator().manual_seed(5)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    for moment, y, g in zip(
        streamed, hidden[1:], torch.autograd.grad(loss, hidden[1:]), strict=True
    ):
        weighted = (g * y.detach().square().mean(-1, keepdim=True).sqrt()).flatten(0, 1)
        torch.testing.assert_close(moment, weighted.T @ weighted / tokens.numel())
