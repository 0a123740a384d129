"""One block learned against its float outputs, in each mode."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Literal

import pytest
import torch

from bitmill.errors import CalibrationError, Cancelled
from bitmill.models.streamed import set_weight, weight_of
from bitmill.refinement.omniquant.block import BlockData, _Run, learn_block
from bitmill.refinement.omniquant.metric import fisher_metric, gradient_moments
from bitmill.refinement.omniquant.settings import LearningSettings
from learning import block_data, starts, tiny

MODES: tuple[Literal["clipping", "scales", "rounding"], ...] = ("clipping", "scales", "rounding")


def settings(mode: Literal["clipping", "scales", "rounding"]) -> LearningSettings:
    return replace(LearningSettings.of_mode(mode), epochs=6, batch=2, block_error="plain")


def run(mode: Literal["clipping", "scales", "rounding"], widths: tuple[int, ...] = (2, 3)):
    model = tiny().model
    block = model.load_block(0)
    start = starts(0, widths, order=True, clip=mode != "clipping")
    return start, block, learn_block(model, 0, block, start, block_data(), settings(mode), seed=0)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_lowers_the_held_out_error(
    mode: Literal["clipping", "scales", "rounding"],
) -> None:
    """Measured from outside: the block as it is left, against the float block."""
    model, data = tiny().model, block_data()
    _, block, learned = run(mode)
    report = learned.report
    assert report.kept == "learned"
    assert report.loss_after < report.loss_before
    error = (model.run_block(0, block, data.held_out_inputs) - data.held_out_targets).square()
    assert float(error.mean()) == pytest.approx(report.loss_after, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_packing_what_was_learned_is_exact(mode: Literal["clipping", "scales", "rounding"]) -> None:
    model = tiny().model
    start, block, learned = run(mode, (1, 3))
    for name, module in model.linears(block, 0).items():
        weight = learned.weights[name]
        assert weight.widths == start[name].widths
        packed = weight.pack().unpack()
        assert torch.equal(packed.codes, weight.codes)
        assert torch.equal(packed.dequantize(), weight_of(module))


@pytest.mark.parametrize("mode", MODES)
def test_dropped_groups_stay_dropped_while_others_learn(
    mode: Literal["clipping", "scales", "rounding"],
) -> None:
    start, _, learned = run(mode, (0, 3))
    assert learned.report.kept == "learned"
    assert learned.report.loss_after < learned.report.loss_before
    for name, weight in learned.weights.items():
        assert weight.widths == start[name].widths
        dropped = [g for g, width in enumerate(weight.widths) if not width]
        assert dropped
        assert not weight.scales[dropped].any()
        assert not weight.zeros[dropped].any()
        assert not weight.codes[:, :128].any()
        assert not torch.equal(weight.scales, start[name].scales)
        assert torch.equal(weight.pack().unpack().dequantize(), weight.dequantize())


def test_rounding_gains_more_than_scales() -> None:
    gains = [run(mode)[2].report.loss_after for mode in ("scales", "rounding")]
    assert gains[1] < gains[0]


def test_a_block_that_does_not_improve_keeps_its_start() -> None:
    """Rates so high that nothing learned is of use."""
    model = tiny().model
    block, start = model.load_block(0), starts(0)
    wild = replace(settings("rounding"), position_rate=50.0, scale_rate=5.0)
    learned = learn_block(model, 0, block, start, block_data(), wild, seed=0)
    assert learned.report.kept == "start"
    assert learned.report.loss_after == learned.report.loss_before
    assert learned.report.rollbacks > 0
    for name, module in model.linears(block, 0).items():
        assert torch.equal(learned.weights[name].codes, start[name].codes)
        assert torch.equal(weight_of(module), start[name].dequantize())


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, second = run("rounding")[2], run("rounding")[2]
    for name, weight in first.weights.items():
        assert torch.equal(weight.codes, second.weights[name].codes)
        assert torch.equal(weight.scales, second.weights[name].scales)


def test_the_augmented_loss_also_follows_the_float_block_on_quantized_inputs() -> None:
    """Where targets come from inputs unlike the ones seen, it pulls towards the latter."""
    model, data = tiny().model, block_data()
    noise = 0.3 * torch.randn(data.targets.shape, generator=torch.Generator().manual_seed(0))
    shifted = BlockData(
        data.inputs, data.targets + noise, data.held_out_inputs, data.held_out_targets
    )
    plain, augmented = (
        learn_block(
            model,
            0,
            model.load_block(0),
            starts(0),
            shifted,
            replace(settings("rounding"), augmented_loss=flag),
            seed=0,
        ).report
        for flag in (False, True)
    )
    assert augmented.loss_after < plain.loss_after


def test_the_fisher_error_is_lowered_too() -> None:
    model = tiny().model
    moment = gradient_moments(model, tiny().tokens, seed=0)[0]
    learned = learn_block(
        model,
        0,
        model.load_block(0),
        starts(0),
        block_data(),
        settings("rounding"),
        seed=0,
        metric=fisher_metric(moment, 0.3),
    )
    assert learned.report.kept == "learned"


@pytest.mark.parametrize("rate", [1e-2, 50.0])
def test_other_texts_are_measured_and_decide_nothing(rate: float) -> None:
    """Their errors are those of the weights before and of the weights that are kept."""
    model, data = tiny().model, block_data()
    chosen = replace(settings("rounding"), position_rate=rate, scale_rate=rate / 5)
    texts = {"other": (data.inputs[:3, :20], data.targets[:3, :20])}
    start, watched = starts(0), replace(data, texts=texts)
    block = model.load_block(0)
    for name, module in model.linears(block, 0).items():
        set_weight(module, start[name].dequantize())

    def error() -> float:
        inputs, targets = texts["other"]
        return float((model.run_block(0, block, inputs) - targets).square().mean())

    before = error()
    plain = learn_block(model, 0, model.load_block(0), start, data, chosen, seed=0)
    learned = learn_block(model, 0, block, start, watched, chosen, seed=0)
    assert learned.report.kept == ("learned" if rate < 1 else "start")
    assert learned.report.texts["other"] == pytest.approx((before, error()), rel=1e-4)
    for name, weight in plain.weights.items():
        assert torch.equal(learned.weights[name].codes, weight.codes)


def test_without_held_out_sequences_learning_is_refused() -> None:
    model, data = tiny().model, block_data()
    empty = BlockData(data.inputs, data.targets, data.inputs[:0], data.targets[:0])
    with pytest.raises(CalibrationError, match="held-out"):
        learn_block(model, 0, model.load_block(0), starts(0), empty, settings("scales"), seed=0)


def test_an_error_reaches_the_caller_and_leaves_the_block_whole() -> None:
    model = tiny().model
    block = model.load_block(0)
    linears = model.linears(block, 0)

    def stop(*_: object) -> None:
        raise Cancelled("stop")

    block.register_forward_hook(stop)
    with pytest.raises(Cancelled):
        learn_block(model, 0, block, starts(0), block_data(), settings("scales"), seed=0)
    assert model.linears(block, 0) == linears


@pytest.mark.parametrize(
    ("device", "experts", "static"),
    [("cuda:0", 0, True), ("cpu", 0, False), ("cuda:0", 4, False)],
)
def test_steps_are_static_on_the_models_device_whatever_its_index(
    device: str, experts: int, static: bool
) -> None:
    inputs = SimpleNamespace(device=torch.device(device))
    model = SimpleNamespace(device=torch.device("cuda"), plan=SimpleNamespace(experts=experts))
    run = SimpleNamespace(data=SimpleNamespace(inputs=inputs), model=model)
    assert vars(_Run)["is_static"].fget(run) is static
