import pytest
import torch

from bitmill.calibration.hooks import observe
from bitmill.calibration.statistics import BlockState, Stream, collect, residual_writers
from bitmill.models.streamed import StreamedModel
from streaming import streamed, token_windows
from tiny import tiny_llama, tiny_opt

PREFIX = "model.layers.0."


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    return streamed(tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    return streamed(tiny_opt(tmp_path_factory.mktemp("opt")))


def every_third(count):
    return torch.arange(0, count, 3)


def test_statistics_predict_the_error_of_any_replacement(opt):
    """Independent: run the linear on the inputs and compare outputs token by token."""
    calibration = opt.embed(token_windows(5))
    noisy = calibration + 0.05 * torch.randn(
        calibration.shape, generator=torch.Generator().manual_seed(3)
    )
    block, source = opt.load_block(0), opt.load_block(0)
    for one in (block, source):
        one.fc2.bias.copy_(torch.linspace(-0.1, 0.1, len(one.fc2.bias)))
    writers = residual_writers(opt, 0, block, noisy[:1])
    name = "model.decoder.layers.0.fc2"
    assert writers == ("model.decoder.layers.0.self_attn.out_proj", name)
    replacement = block.fc2.weight.detach() * 0.9
    ran = {}
    for key, module, hidden in (("now", block, noisy), ("was", source, calibration)):
        ran[key] = observe(opt, 0, module, {"fc2": module.fc2}, hidden)["fc2"]
    stream_now = opt.run_block(0, block, noisy).flatten(0, 1)
    stream_was = opt.run_block(0, source, calibration).flatten(0, 1)
    x, W = ran["now"].x.double(), block.fc2.weight.detach().double()
    changed = x @ (W - replacement.double()).T
    some = torch.arange(0, len(W), 3)
    for chosen, missing in (
        ((), ran["was"].y.double() - ran["now"].y.double()),
        (writers, (stream_was - stream_now).detach().double()),
    ):
        state = BlockState(opt, 0, block, source, opt.linears(block, 0), chosen)
        found = collect(state, [[name]], Stream(noisy, calibration), batch=2)[name]
        expected = float((missing + changed).square().sum(1).mean())
        residual = (W - replacement).float()
        assert float(found.error(residual)) == pytest.approx(expected, rel=1e-3)
        part = collect(state, [[name]], Stream(noisy, calibration), batch=2, rows=every_third)
        assert torch.equal(part[name].energy, found.energy[some])
        exact = (missing + changed)[:, some].square().sum(1).mean()
        assert float(part[name].error(residual[some])) == pytest.approx(float(exact), rel=1e-3)
        assert found.tokens == 5 * 48
        plain = collect(state, [[name]], Stream(noisy, calibration), batch=2, judge=False)[name]
        assert (plain.shift - found.shift).norm() < 1e-5 * found.shift.norm()
        with pytest.raises(ValueError, match="judge=True"):
            plain.error(replacement)


def test_linears_behind_a_norm_do_not_count_as_residual_writers(llama):
    block = llama.load_block(0)
    hidden = llama.embed(token_windows(1))
    assert residual_writers(llama, 0, block, hidden) == (
        PREFIX + "self_attn.o_proj",
        PREFIX + "mlp.down_proj",
    )
    block.mlp.register_forward_hook(lambda _, args, output: torch.tanh(output))
    assert residual_writers(llama, 0, block, hidden) == ()


def test_half_precision_rounding_hides_no_residual_writer(tmp_path):
    """Its own sums differ from the model's by more than 1e-3 of the output's norm."""
    folder = tiny_llama(tmp_path)
    model = streamed(folder, dtype=torch.bfloat16)
    block, hidden = model.load_block(0), model.embed(token_windows(1))
    writers = PREFIX + "self_attn.o_proj", PREFIX + "mlp.down_proj"
    assert residual_writers(model, 0, block, hidden) == writers


def test_a_linear_that_adds_a_share_of_its_output_is_no_residual_writer(llama):
    """Granite scales what it adds; beside large hidden states little is missing."""
    block = llama.load_block(0)
    hidden = llama.embed(token_windows(1))
    hidden = hidden * 2000 / hidden.std()
    block.mlp.register_forward_hook(lambda _, args, output: 0.7 * output)
    output, plain = (llama.run_block(0, b, hidden) for b in (block, llama.load_block(0)))
    assert (output - plain).norm() < 1e-3 * plain.norm()
    assert residual_writers(llama, 0, block, hidden) == ()


def test_linears_of_a_group_share_h(llama):
    block = llama.load_block(0)
    state = BlockState(llama, 0, block, None, llama.linears(block, 0))
    names = [PREFIX + f"self_attn.{part}_proj" for part in "qkv"]
    stream = Stream(llama.embed(token_windows(3)))
    shared = collect(state, [names], stream, batch=2)
    assert shared[names[0]].H is shared[names[2]].H
    x = observe(llama, 0, block, {"q": block.self_attn.q_proj}, stream.hidden)["q"].x.double()
    assert torch.allclose(shared[names[1]].H.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normed_first", [True, False])
def test_one_run_gives_hessians_inputs_and_outputs(tmp_path, normed_first):
    """Without a norm before attention q, k and v read the block's own input."""
    model = streamed(tiny_opt(tmp_path, do_layer_norm_before=normed_first))
    hidden, block = model.embed(token_windows(5)), model.load_block(1)
    groups = model.plan.siblings(1)
    state = BlockState(model, 1, block, None, model.linears(block, 1))
    expected = collect(state, groups, Stream(hidden), batch=2)
    linears = {group[0]: state.linears[group[0]] for group in groups}
    inputs = {name: one.x for name, one in observe(model, 1, block, linears, hidden).items()}
    kept = {group[0]: [] for group in groups}

    def keep(part, batch):
        assert batch.keys() == kept.keys()
        for name, x in batch.items():
            kept[name].append(x)

    stream = Stream(hidden.clone())
    seen = collect(state, groups, stream, batch=2, advance=True, on_batch=keep)
    assert torch.allclose(stream.hidden, model.run_block(1, block, hidden), atol=1e-5)
    assert not torch.allclose(stream.hidden, hidden, atol=1e-2)
    assert seen.keys() == state.linears.keys()
    for name, statistics in seen.items():
        assert torch.equal(statistics.H, expected[name].H)
    for name, parts in kept.items():
        assert [len(x) for x in parts] == [96, 96, 48]
        assert torch.allclose(torch.cat(parts), inputs[name], atol=1e-5)
