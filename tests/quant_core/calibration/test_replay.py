"""Runs that resume give the bytes of runs that do not, in every architecture."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from bitmill.calibration import replay
from bitmill.calibration.replay import Replay
from bitmill.calibration.statistics import (
    BlockState,
    Stream,
    advance_hidden,
    collect,
    residual_writers,
)
from bitmill.models.streamed import StreamedModel, set_weight, weight_of
from streaming import streamed, token_windows
from tiny import save_tiny, tiny_llama
from tiny_architectures import COVERED, tiny_config

RESUMED = {
    "bloom": [],
    "falcon": ["self_attention", "mlp"],
    "gemma2": ["mlp"],
    "gpt2": ["attn", "mlp"],
    "gpt_neox": ["attention", "mlp"],
    "mixtral": ["self_attn"],
    "opt": ["self_attn"],
    "qwen3_moe": ["self_attn"],
}
"""Modules that return what their last linear gives, where they are not those of a Llama: Bloom's
add the stream, Gemma 2's attention returns its weights too, and OPT has no module for its MLP."""

GATE = "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    return streamed(tiny_llama(tmp_path_factory.mktemp("llama")))


def block_state(model, stream):
    block = model.load_block(0)
    source = copy.deepcopy(block)
    writers = residual_writers(model, 0, block, stream.hidden[:1])
    return BlockState(model, 0, block, source, model.linears(block, 0), writers)


def noisy_stream(model):
    exact = model.embed(token_windows(5, T=24))
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    return Stream(exact + 0.05 * exact.std() * noise, exact.clone())


@pytest.fixture
def stream(llama):
    return noisy_stream(llama)


def install(state, names):
    """What stands for quantization: weights rounded coarsely."""
    for name in names:
        weight = weight_of(state.linears[name])
        step = weight.abs().max() / 7
        set_weight(state.linears[name], (weight / step).round() * step)


def outputs(model, block, hidden):
    with torch.no_grad():
        return torch.cat([model.run_block(0, block, part) for part in hidden.split(2)])


def walk(state, stream, sequential=True):
    """Statistics of all steps as refinement takes them, each beside those of whole runs."""
    steps = state.model.plan.input_steps(0)
    for step in steps:
        last = step is steps[-1]
        whole = replace(stream, source=stream.source.clone())
        fresh = collect(replace(state, replay=Replay()), step, whole, batch=2, advance_source=last)
        found = collect(state, step, stream, batch=2, advance_source=last)
        assert torch.equal(stream.source, whole.source)
        yield found, fresh
        if sequential:
            install(state, [name for group in step for name in group])


def assert_same(found, fresh):
    assert found.keys() == fresh.keys()
    for name, statistics in found.items():
        assert torch.equal(statistics.H, fresh[name].H)
        assert statistics.tokens == fresh[name].tokens
        for own, other in (
            (statistics.shift, fresh[name].shift),
            (statistics.energy, fresh[name].energy),
        ):
            assert (own is None) == (other is None)
            assert own is None or torch.equal(own, other)


@pytest.mark.parametrize("model_type", sorted(COVERED))
def test_resumed_runs_give_the_same_bytes(model_type, tmp_path):
    model = streamed(save_tiny(tmp_path / model_type, tiny_config(model_type)))
    stream = noisy_stream(model)
    state = block_state(model, stream)
    source = outputs(model, state.source, stream.source)
    for found, fresh in walk(state, stream):
        assert_same(found, fresh)
    assert [tail.path for tail in state.replay.tails] == RESUMED.get(
        model_type, ["self_attn", "mlp"]
    )
    assert torch.equal(stream.source, source)
    expected = outputs(model, state.current, stream.hidden)
    advance_hidden(state, stream, batch=2)
    assert torch.equal(stream.hidden, expected)
    assert not torch.equal(expected, source)


def count_rows(state, block):
    """Tokens that each linear of a block multiplies from now on."""
    rows = dict.fromkeys(state.linears, 0)

    def count(name):
        def hook(module, args, output):
            if "forward" not in vars(module):
                rows[name] += output.shape[:-1].numel()

        return hook

    for name, module in state.model.linears(block, 0).items():
        module.register_forward_hook(count(name))
    return rows


def test_each_linear_runs_once_or_twice(llama, stream):
    """In the source once; in the block its output before and after it is quantized, if it adds to
    the stream. The first window runs once more, to find where runs can resume."""
    state = block_state(llama, stream)
    current, source = count_rows(state, state.current), count_rows(state, state.source)
    steps = llama.plan.input_steps(0)
    for step in steps:
        collect(state, step, stream, batch=2, advance_source=step is steps[-1])
        install(state, [name for group in step for name in group])
    advance_hidden(state, stream, batch=2)
    assert set(source.values()) == {5 * 24}
    for name, rows in current.items():
        assert rows == 24 + 5 * 24 * (2 if name in state.writers else 1)


def test_what_memory_does_not_hold_is_run_again(llama, stream, monkeypatch):
    """There is room for what attention gives in both blocks, not for all inputs of down_proj."""
    widest = 256
    inputs = 2 * 5 * 24 * 160 * 4
    monkeypatch.setattr(replay, "MOST_BYTES", 12 * widest**2 + inputs)
    state = block_state(llama, stream)
    current = count_rows(state, state.current)
    for found, fresh in walk(state, stream):
        assert_same(found, fresh)
    expected = outputs(llama, state.current, stream.hidden)
    before = current[GATE]
    advance_hidden(state, stream, batch=2)
    assert 0 < current[GATE] - before < 5 * 24
    assert torch.equal(stream.hidden, expected)


def test_nothing_is_kept_without_room(llama, stream, monkeypatch):
    monkeypatch.setattr(replay, "MOST_BYTES", 0)
    state = block_state(llama, stream)
    for found, fresh in walk(state, stream):
        assert_same(found, fresh)
    current = count_rows(state, state.current)
    advance_hidden(state, stream, batch=2)
    assert set(current.values()) == {5 * 24}


@pytest.mark.parametrize("changed", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_what_was_kept_before_a_weight_changed_is_run_again(llama, stream, changed):
    state = block_state(llama, stream)
    for _ in walk(state, stream):
        pass
    set_weight(
        state.current.get_submodule(changed), 0.5 * state.source.get_submodule(changed).weight
    )
    expected = outputs(llama, state.current, stream.hidden)
    advance_hidden(state, stream, batch=2)
    assert torch.equal(stream.hidden, expected)


def test_stages_without_the_linears_before_them_quantized(llama, stream):
    state = block_state(llama, stream)
    for found, fresh in walk(state, stream, sequential=False):
        assert_same(found, fresh)
    install(state, state.linears)
    expected = outputs(llama, state.current, stream.hidden)
    advance_hidden(state, stream, batch=2)
    assert torch.equal(stream.hidden, expected)


def test_stages_can_be_observed_in_any_order(llama, stream):
    state = block_state(llama, stream)
    steps = llama.plan.input_steps(0)
    for step in (*steps, *reversed(steps), steps[2]):
        fresh = collect(replace(state, replay=Replay()), step, stream, batch=2)
        assert_same(collect(state, step, stream, batch=2), fresh)


def test_what_the_block_adds_in_place_to_is_run_again(llama, stream):
    state = block_state(llama, stream)
    steps = llama.plan.input_steps(0)
    collect(state, steps[0], stream, batch=2)
    for block in (state.current, state.source):
        block.self_attn.register_forward_hook(lambda _, args, output: (output[0].add_(1), None))
    for step in steps[1:]:
        fresh = collect(replace(state, replay=Replay()), step, stream, batch=2)
        assert_same(collect(state, step, stream, batch=2), fresh)


def test_modules_that_change_what_their_linear_gave_are_run(llama, stream):
    state = block_state(llama, stream)
    down = state.current.mlp.down_proj
    state.current.mlp.forward = lambda x: down(nn.functional.pad(x, (0, 96))).mul_(0.5)
    state.current.self_attn.register_forward_hook(lambda _, args, output: (output[0] + 1, None))
    state.replay.look(llama, 0, state.current, state.linears, stream.hidden[:1])
    assert state.replay.tails == ()


def test_no_trace_is_left_on_the_block(llama, stream):
    state = block_state(llama, stream)
    for _ in walk(state, stream):
        pass
    advance_hidden(state, stream, batch=2)
    for block in (state.current, state.source):
        for module in block.modules():
            assert "forward" not in vars(module)
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
