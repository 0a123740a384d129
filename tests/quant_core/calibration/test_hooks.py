import pytest
import torch

from bitmill.calibration.hooks import embed_windows, observe, run_windows
from bitmill.models.streamed import StreamedModel
from streaming import streamed
from tiny import tiny_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    return streamed(tiny_llama(tmp_path_factory.mktemp("llama")))


def hidden(model):
    tokens = torch.randint(2, 258, (3, 20), generator=torch.Generator().manual_seed(0))
    return model.embed(tokens)


def test_a_linear_reads_and_writes_what_was_seen(llama):
    block = llama.load_block(0)
    linears = {"k": block.self_attn.k_proj, "down": block.mlp.down_proj}
    seen = observe(llama, 0, block, linears, hidden(llama))
    assert set(seen) == {"k", "down"}
    for name, module in linears.items():
        assert seen[name].x.shape == (60, module.in_features)
        assert torch.allclose(seen[name].y, module(seen[name].x), atol=1e-6)
        assert not seen[name].y.requires_grad


def test_the_block_runs_no_further_than_the_last_linear_asked_about(llama):
    block = llama.load_block(0)
    calls = []
    block.mlp.register_forward_pre_hook(lambda *_: calls.append("mlp"))
    observe(llama, 0, block, {"o": block.self_attn.o_proj}, hidden(llama))
    assert calls == []
    observe(llama, 0, block, {"up": block.mlp.up_proj}, hidden(llama))
    assert calls == ["mlp"]


def test_a_linear_that_is_not_called_is_absent_and_no_hook_is_left(llama):
    block = llama.load_block(0)
    idle = torch.nn.Linear(4, 4)
    seen = observe(llama, 0, block, {"idle": idle, "q": block.self_attn.q_proj}, hidden(llama))
    assert set(seen) == {"q"}
    assert not block.self_attn.q_proj._forward_hooks


def test_windows_run_in_batches_into_a_tensor_of_their_own_or_one_given(llama):
    block, x = llama.load_block(1), hidden(llama)
    expected = llama.run_block(1, block, x)
    before = x.clone()
    assert torch.allclose(run_windows(llama, 1, block, x, batch=2), expected, atol=1e-6)
    assert torch.equal(x, before)
    assert run_windows(llama, 1, block, x, batch=2, out=x) is x
    assert torch.allclose(x, expected, atol=1e-6)


def test_windows_are_embedded_in_batches(llama):
    tokens = torch.randint(2, 258, (3, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(embed_windows(llama, tokens, batch=2), llama.embed(tokens))
    given = torch.empty(3, 20, llama.plan.hidden_size)
    assert embed_windows(llama, tokens, batch=1, out=given) is given
    assert torch.equal(given, llama.embed(tokens))
