"""Texts that travel along: their inputs and targets are the models' own."""

from __future__ import annotations

import torch

from bitmill.calibration.windows import CalibrationSet, evaluation_tokens
from bitmill.models.streamed import set_weight
from bitmill.refinement.omniquant.watched_texts import TEXTS, WINDOWS, WatchedTexts
from learning import starts, tiny


@torch.no_grad()
def test_inputs_come_from_the_quantized_prefix_and_targets_from_the_float_model() -> None:
    model = tiny().model
    calibration = CalibrationSet(tiny().tokens[:, :24], tiny().held_out, "", framing="none")
    texts = WatchedTexts(model, model, calibration)
    texts.pairs(0)
    block = model.load_block(0)
    for name, module in model.linears(block, 0).items():
        set_weight(module, starts(0)[name].dequantize())
    texts.advance(0, block)
    found = texts.pairs(1)
    assert tuple(found) == TEXTS
    for name, (inputs, targets) in found.items():
        tokens = evaluation_tokens(
            name, model.source.folder, length=24, sequences=WINDOWS, framing="none"
        )
        assert torch.equal(texts.tokens[name], tokens)
        assert torch.equal(inputs, model.run_block(0, block, model.embed(tokens)))
        hidden = model.embed(tokens)
        for index in range(2):
            hidden = model.run_block(index, model.load_block(index), hidden)
        assert torch.equal(targets, hidden)


def test_a_block_of_an_earlier_run_is_passed_without_asking_for_its_pairs() -> None:
    model = tiny().model
    calibration = CalibrationSet(tiny().tokens[:, :24], tiny().held_out, "")
    asked, silent = (WatchedTexts(model, model, calibration) for _ in range(2))
    asked.pairs(0)
    for texts in (asked, silent):
        texts.advance(0, model.load_block(0))
    for name, (inputs, targets) in silent.pairs(1).items():
        assert torch.equal(inputs, asked.pairs(1)[name][0])
        assert torch.equal(targets, asked.pairs(1)[name][1])
