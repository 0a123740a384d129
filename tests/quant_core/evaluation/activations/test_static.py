"""Rule "static": one grid for all tokens, from calibration."""

from __future__ import annotations

from pathlib import Path

import torch

from bitmill.config.rounded import ACTIVATION_RULES, OBSERVING_RULES, Rounded
from bitmill.evaluation.activations.grids import rounded_tokens
from bitmill.evaluation.activations.rule import LinearInputs
from bitmill.evaluation.activations.static import Static
from bitmill.evaluation.logits import StreamedLogits
from bitmill.evaluation.rounded import observing, rounding, rule_of
from streaming import streamed, token_windows
from tiny import tiny_llama

NONE = torch.empty(0, dtype=torch.int64)


def test_all_tokens_share_a_grid_and_values_beyond_go_to_its_ends() -> None:
    inputs = LinearInputs(NONE, torch.tensor(-1.0), torch.tensor(2.0))
    x = torch.tensor([[-1.0, 0.4, 0.6, 2.0], [-7.0, 0.1, 1.6, 9.0]])
    expected = torch.tensor([[-1.0, 0, 1, 2], [-1, 0, 2, 2]])
    assert torch.equal(Static().rounded(x, 2, inputs), expected)
    unseen = Static().rounded(x, 2, LinearInputs(NONE))
    assert torch.equal(unseen, rounded_tokens(x, 2))


def test_ranges_are_those_of_all_windows_and_nothing_is_changed(tmp_path: Path) -> None:
    model, tokens = streamed(tiny_llama(tmp_path)), token_windows(3)
    plain, ranges = StreamedLogits(model).last_block(tokens), {}
    changes = observing(ranges)

    def replace(i: int, block: torch.nn.Module) -> None:
        changes(model, i, block)

    assert torch.equal(StreamedLogits(model, replace=replace).last_block(tokens), plain)
    assert ranges.keys() == model.plan.by_name.keys()
    first = model.load_block(0).input_layernorm(model.embed(tokens))
    least, most = ranges["model.layers.0.self_attn.q_proj"]
    assert (least, most) == tuple(first.aminmax())

    static = rounding(Rounded("activations", 8, rule="static"), ranges=ranges)

    def rounds(i: int, block: torch.nn.Module) -> None:
        static(model, i, block)

    found = StreamedLogits(model, replace=rounds).last_block(tokens)
    assert 0 < (found - plain).norm() < 0.1 * plain.norm()


def test_estimates_know_the_rules_that_observe() -> None:
    found = {name for name in ACTIVATION_RULES.names() if rule_of(name).observes}
    assert found == OBSERVING_RULES
