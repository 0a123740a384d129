"""Gradients through a packed model, and adapters on it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bitmill
from bitmill.errors import InputError
from bitmill.inference.linear import QuantizedLinear
from tiny import tiny_llama
from weights import PackedModel, dequantized_model, pack_model

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(  # peft 0.21.2 asks transformers 5.23 in its old words
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
TOKENS = torch.arange(2, 26)[None]
GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="module", params=["natural", "activation"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("gradients")
    return pack_model(tiny_llama(folder / "source"), folder / "packed", order=request.param)


def loaded(packed: PackedModel) -> Any:
    return bitmill.load(packed.folder, dtype="float32").eval()


def loss_gradient(model: Any, start: Tensor) -> Tensor:
    inputs = start.clone().requires_grad_()
    model(inputs_embeds=inputs, labels=TOKENS).loss.backward()
    assert inputs.grad is not None
    return inputs.grad


def test_the_gradient_for_the_embeddings_is_the_dequantized_models(packed: PackedModel) -> None:
    model, twin = loaded(packed), dequantized_model(packed, torch.float32)
    start = model.get_input_embeddings()(TOKENS).detach()
    have, want = loss_gradient(model, start), loss_gradient(twin, start)
    assert (have - want).norm() < 1e-5 * want.norm()


def test_recomputed_activations_give_the_same_gradient(packed: PackedModel) -> None:
    block = loaded(packed).get_submodule("model.layers.0.mlp")
    x = torch.randn(1, 24, block.hidden_size, generator=torch.Generator().manual_seed(0))
    gradients = []
    for run in (block, partial(checkpoint, block, use_reentrant=False)):
        inputs = x.clone().requires_grad_()
        run(inputs).square().sum().backward()
        gradients.append(inputs.grad)
    assert torch.equal(*gradients)


def with_adapter(model: Any, targets: list[str]) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=4))


def trained(model: Any, tokens: Tensor) -> list[float]:
    """The losses of ten steps of an adapter's training."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_an_adapter_trains_is_saved_and_comes_back(packed: PackedModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_adapter(loaded(packed), ["q_proj", "down_proj"])
    losses = trained(model, TOKENS)
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        again = peft.PeftModel.from_pretrained(loaded(packed), tmp_path)
        assert torch.equal(again(TOKENS).logits, model.eval()(TOKENS).logits)


def test_an_adapter_trains_beside_trellis_codes_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = GOLDEN / "packed-v2"
    model = with_adapter(bitmill.load(folder, dtype="float32").eval(), ["q_proj", "down_proj"])
    tokens = TOKENS % model.config.vocab_size
    losses = trained(model, tokens)
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path)
    plain = bitmill.load(folder, dtype="float32").eval().dequantize()
    copy = peft.PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
    with torch.inference_mode():
        assert torch.allclose(copy(tokens).logits, model.eval()(tokens).logits, atol=1e-4)


def test_prompt_tuning_gets_a_gradient(packed: PackedModel) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(loaded(packed), config)
    model(TOKENS, labels=TOKENS).loss.backward()
    (prompt,) = (p for p in model.parameters() if p.requires_grad)
    assert prompt.grad is not None
    assert prompt.grad.abs().sum() > 0


MERGES: dict[str, Callable[[Any], Any]] = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safe_merge": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("merge", MERGES)
def test_a_merge_into_codes_is_refused_and_the_adapter_stays(
    packed: PackedModel, merge: str
) -> None:
    torch.manual_seed(0)
    model = with_adapter(loaded(packed), ["q_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    with torch.inference_mode():
        before = model(TOKENS).logits
    with pytest.raises(InputError, match="cannot be merged into packed codes"):
        MERGES[merge](model)
    with torch.inference_mode():
        assert torch.equal(model(TOKENS).logits, before)


def test_an_adapter_merges_into_a_dequantized_copy(packed: PackedModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_adapter(loaded(packed), ["q_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    copy = peft.PeftModel.from_pretrained(loaded(packed).dequantize(), tmp_path).merge_and_unload()
    with torch.inference_mode():
        assert torch.allclose(copy(TOKENS).logits, model(TOKENS).logits, atol=1e-4)


def add_to_data(weight: Tensor) -> None:
    weight.data += 1.0


def replace_data(weight: Tensor) -> None:
    weight.data = torch.zeros_like(weight)


def set_rows(weight: Tensor) -> None:
    weight[0] = 0.0


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "data +=": add_to_data,
    "data =": replace_data,
    "rows": set_rows,
    "copy_": lambda weight: weight.copy_(torch.zeros_like(weight)),
    "init": lambda weight: nn.init.normal_(weight),
    "out": lambda weight: torch.neg(torch.zeros_like(weight), out=weight),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_a_packed_weight_is_refused(packed: PackedModel, write: str) -> None:
    module = loaded(packed).get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(module, QuantizedLinear)
    with pytest.raises(InputError, match="cannot be written to"), torch.no_grad():
        WRITES[write](module.weight)


def test_a_packed_weight_is_read_as_any_tensor(packed: PackedModel) -> None:
    module = loaded(packed).get_submodule("model.layers.0.self_attn.q_proj")
    weight = module.weight
    assert type(weight + 1) is Tensor
    assert torch.equal(weight.float(), module.dequantize())
    assert weight.clone().zero_().sum() == 0


@pytest.mark.parametrize("dtype", [None, "float32", "torch.bfloat16", torch.float16])
def test_a_saved_model_is_dequantized(packed: PackedModel, tmp_path: Path, dtype: Any) -> None:
    model = loaded(packed)
    with torch.inference_mode():
        before = model(TOKENS).logits
        model.save_pretrained(tmp_path / "again")
        after = model.dequantize(dtype) if dtype else model.dequantize()
        got = after.to(torch.float32)(TOKENS).logits
    assert (got - before).norm() < 2e-2 * before.norm()


@pytest.mark.parametrize("dtype", ["floaty32", "int8", "load", 7])
def test_an_unknown_dtype_is_refused(packed: PackedModel, dtype: Any) -> None:
    with pytest.raises(InputError, match="no floating-point dtype"):
        bitmill.load(packed.folder, dtype=dtype)
