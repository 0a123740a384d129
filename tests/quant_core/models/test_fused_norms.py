import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitmill.models.fused_norms import fuse_norms
from tiny_architectures import COVERED, tiny_config


def block_of(model_type, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=dtype)
    block = model.model.layers[0]
    with torch.no_grad():
        for name, value in block.named_parameters():
            if "norm" in name:
                value.add_(0.3 * torch.randn_like(value))
    return block


@pytest.mark.parametrize(
    ("model_type", "count"), [("llama", 2), ("qwen3", 4), ("phi3", 2), ("gemma2", 0), ("opt", 0)]
)
def test_norms_that_are_rms_norms_are_replaced(model_type, count):
    assert model_type in COVERED
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.bfloat16)
    modules = dict(model.named_modules())
    block = modules.get("model.layers.0") or modules["model.decoder.layers.0"]
    assert len(fuse_norms(block)) == count


def test_a_replaced_norm_gives_the_same_up_to_one_rounding():
    block = block_of("llama")
    norm, x = block.input_layernorm, torch.randn(50, 64).bfloat16()
    expected = norm(x)
    exact = copy.deepcopy(norm).double()(x.double())
    assert "input_layernorm" in fuse_norms(block)
    missed = (norm(x).double() - exact).norm()
    assert missed <= (expected.double() - exact).norm()
    assert missed <= 0.005 * exact.norm()


def test_a_copy_uses_its_own_weight():
    block = block_of("llama")
    fuse_norms(block)
    other = copy.deepcopy(block)
    x = torch.randn(3, 64).bfloat16()
    before = block.input_layernorm(x)
    with torch.no_grad():
        other.input_layernorm.weight.zero_()
    assert torch.equal(block.input_layernorm(x), before)
    assert not other.input_layernorm(x).any()
