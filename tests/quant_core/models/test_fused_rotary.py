from __future__ import annotations

import copy
import functools
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotation

from bitmill.calibration.replay import Replay
from bitmill.models import fused_rotary
from bitmill.models.fused_rotary import fuse_rotary
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import make_plan
from rotations import tensors
from streaming import SPEC, streamed, token_windows
from tiny import save_tiny, tiny_llama
from tiny_architectures import COMMON, COVERED, GROUPED, tiny_config

WITHOUT = {"bloom", "gpt2", "opt"}
ELSEWHERE = {"falcon": "self_attention", "gpt_neox": "attention"}


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    return llama_rotation(q, k, cos, sin, unsqueeze_dim)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, q, k, cos, sin, *extra, **named):
        return apply_rotary_pos_emb(q, k, cos, sin, *extra, **named)


class Scaled(Attention):
    def forward(self, q, k, cos, sin, *, factor=0.5):
        assert len(apply_rotary_pos_emb(q, k, cos, sin)) == 2
        return super().forward(factor * q, k, cos, sin)


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Decorated(Attention):
    forward = decorated(Attention.forward)


@pytest.fixture
def calls(monkeypatch):
    """What fused modules turned."""
    made = []

    def rotate(*args):
        made.append(args)
        return rotate_unseen(*args)

    rotate_unseen = fused_rotary.rotate
    monkeypatch.setattr(fused_rotary, "rotate", rotate)
    return made


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def logits_and_gradient(model, tokens):
    weight = next(p for name, p in model.named_parameters() if name.endswith("weight"))
    logits = model(input_ids=tokens, use_cache=False).logits
    return logits.detach(), torch.autograd.grad(logits.square().mean(), weight)[0]


@pytest.mark.parametrize("model_type", sorted(COVERED))
def test_every_rotation_of_an_architecture_is_fused_and_computes_the_same(model_type, calls):
    model, tokens = model_of(tiny_config(model_type)), token_windows(2, T=19)
    expected = logits_and_gradient(model, tokens)
    fused = fuse_rotary(model)
    attention = ELSEWHERE.get(model_type, "self_attn")
    layers = 0 if model_type in WITHOUT else model.config.num_hidden_layers
    assert [path.rpartition(".")[2] for path in fused] == [attention] * layers
    calls.clear()
    for found, plain in zip(logits_and_gradient(model, tokens), expected, strict=True):
        assert torch.equal(found, plain)
    assert len(calls) == layers


@pytest.mark.parametrize("model_type", ["glm", "cohere"])
def test_pairs_of_neighbouring_columns_stay_as_they_are(model_type):
    config = AutoConfig.for_model(model_type, **COMMON, **GROUPED, head_dim=16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert fuse_rotary(model) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotations_agree_in_either_precision(dtype):
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=dtype)
    assert fuse_rotary(model.model.layers[0]) == ["self_attn"]


def test_only_the_block_is_changed():
    model = model_of(tiny_config("llama"))
    one, other = model.model.layers
    kind, forward = type(other.self_attn), type(other.self_attn).forward
    fuse_rotary(one)
    assert type(other.self_attn) is kind
    assert kind.forward is forward
    assert isinstance(one.self_attn, kind)
    assert type(one.self_attn).__name__ == kind.__name__
    assert fuse_rotary(one) == []


def test_modules_whose_code_is_out_of_reach_stay_as_they_are():
    own = Attention()
    own.forward = lambda *args: args
    for module in (Decorated(), own):
        assert fuse_rotary(module) == []
        assert type(module) in (Decorated, Attention)


@pytest.mark.parametrize("answer", [None, (1, 2), "shapes", "dtype", "three"])
def test_functions_that_answer_otherwise_stay(answer, monkeypatch):
    def other(q, k, cos, sin):
        q, k = llama_rotation(q, k, cos, sin)
        answers = {"shapes": (q[:1], k), "dtype": (q.double(), k), "three": (q, k, k)}
        return answers.get(answer, answer) if isinstance(answer, str) else answer

    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", other)
    kind = type("Other", (Attention,), {})
    assert fuse_rotary(kind()) == []


@pytest.mark.parametrize("extra", [((2,), {}), ((), {"unsqueeze_dim": 2})])
def test_other_arguments_go_to_the_function_itself(extra, calls):
    module = Attention()
    assert fuse_rotary(module) == [""]
    q, k, cos, sin = tensors(T=3, heads=(3, 3))
    args, kwargs = extra
    calls.clear()
    found = module(q.transpose(1, 2), k.transpose(1, 2), cos, sin, *args, **kwargs)
    assert not calls
    for one, other in zip(found, llama_rotation(q, k, cos, sin), strict=True):
        assert torch.equal(one.transpose(1, 2), other)


def test_angles_of_another_precision_go_to_the_function_itself(calls):
    module = Attention()
    fuse_rotary(module)
    q, k, cos, sin = tensors()
    calls.clear()
    assert module(q.bfloat16(), k.bfloat16(), cos, sin)[0].dtype == torch.float32
    assert not calls


def test_fewer_angles_go_to_a_function_that_was_not_seen_to_take_them():
    module = Attention()
    fuse_rotary(module)
    with pytest.raises(RuntimeError):
        module(*tensors(d=16, turned=8))


def test_defaults_and_base_classes_are_kept(calls):
    module = Scaled()
    assert fuse_rotary(module) == [""]
    q, k, cos, sin = tensors()
    calls.clear()
    assert torch.equal(module(q, k, cos, sin)[0], llama_rotation(0.5 * q, k, cos, sin)[0])
    assert len(calls) == 1


def test_a_copy_computes_with_its_own_weights(tmp_path):
    model = streamed(tiny_llama(tmp_path / "llama"))
    block, hidden = model.load_block(0), model.embed(token_windows(2))
    fuse_rotary(block)
    other = copy.deepcopy(block)
    with torch.no_grad():
        before = model.run_block(0, block, hidden)
        assert torch.equal(model.run_block(0, other, hidden), before)
        other.self_attn.q_proj.weight.mul_(3)
        assert torch.equal(model.run_block(0, block, hidden), before)
        assert not torch.equal(model.run_block(0, other, hidden), before)


def test_a_dropped_block_leaves_memory_at_once(tmp_path):
    model = streamed(tiny_llama(tmp_path / "llama"))
    block = model.load_block(0)
    fuse_rotary(block)
    weight = weakref.ref(block.self_attn.q_proj.weight)
    del block
    assert weight() is None


@torch.no_grad()
def test_a_block_that_was_resumed_is_still_fused(tmp_path, calls):
    model = streamed(tiny_llama(tmp_path / "llama"))
    block, hidden = model.load_block(0), model.embed(token_windows(2))
    fuse_rotary(block)
    linears, replay = model.linears(block, 0), Replay()
    replay.look(model, 0, block, linears, hidden)
    turned = []
    for resumed in (False, True, True, False):
        calls.clear()
        if resumed:
            with replay.resumed(block, linears, "batch"):
                output = model.run_block(0, block, hidden)
        else:
            output = model.run_block(0, block, hidden)
        turned.append((len(calls), output))
    assert [count for count, _ in turned] == [1, 1, 0, 1]
    assert all(torch.equal(output, turned[0][1]) for _, output in turned)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "phi3"])
def test_blocks_of_an_accelerator_are_fused(model_type, tmp_path, calls):
    folder = save_tiny(tmp_path / model_type, tiny_config(model_type), dtype="bfloat16")
    device = torch.device("cuda")
    model = StreamedModel(folder, make_plan(folder, SPEC), device=device, dtype=torch.bfloat16)
    plain = streamed(folder)
    hidden = plain.embed(token_windows(2))
    block = model.load_block(0)
    calls.clear()
    with torch.no_grad():
        found = model.run_block(0, block, hidden).float().cpu()
        expected = plain.run_block(0, plain.load_block(0), hidden)
    assert len(calls) == 1
    assert (found - expected).norm() <= 0.02 * expected.norm()
    model.close()
    plain.close()
