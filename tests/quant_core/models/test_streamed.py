"""Streaming a model block by block: shapes, gradients, capture, weights, bad sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from bitmill.errors import ModelError
from bitmill.models.streamed import StreamedModel, capture_inputs, set_weight, weight_of
from bitmill.plan.model_plan import make_plan
from streaming import SPEC, streamed
from tiny import VOCABULARY, save_tiny, tiny_llama, tiny_opt


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(3))


def run_all(model: StreamedModel, tokens: torch.Tensor) -> torch.Tensor:
    hidden = model.embed(tokens)
    for i in range(model.block_count):
        hidden = model.run_block(i, model.load_block(i), hidden)
    return model.logits(hidden)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_opt(tmp_path_factory.mktemp("opt") / "model")


@pytest.fixture(params=["llama", "opt"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def test_batches_of_any_size_give_the_same_rows(folder: Path) -> None:
    model, tokens = streamed(folder), some_tokens(5, 24)
    with torch.no_grad():
        together = run_all(model, tokens)
        for rows in (tokens[:1], tokens[1:4], tokens[4:, :11]):
            begin = {1: 0, 3: 1}[len(rows)] if rows.shape[1] == 24 else 4
            expected = together[begin : begin + len(rows), : rows.shape[1]]
            assert torch.allclose(run_all(model, rows), expected, atol=1e-5)


def test_blocks_run_on_shapes_never_embedded(folder: Path) -> None:
    """run_block alone learns masks and positions of a new shape."""
    tokens = some_tokens(2, 17)
    first, second = streamed(folder), streamed(folder)
    with torch.no_grad():
        hidden = first.embed(tokens)
        expected = first.run_block(0, first.load_block(0), hidden)
        assert torch.equal(second.run_block(0, second.load_block(0), hidden), expected)


def test_gradients_equal_those_of_the_whole_model(folder: Path) -> None:
    """Also where shapes were first seen under inference mode."""
    model, tokens = streamed(folder), some_tokens(2, 16)
    with torch.inference_mode():
        model.embed(tokens)
    hidden = model.embed(tokens)
    block0, block1 = model.load_block(0), model.load_block(1)
    weights = {name: weight_of(m).requires_grad_() for name, m in model.linears(block0, 0).items()}
    out = model.run_block(1, block1, model.run_block(0, block0, hidden))
    log_p = model.logits(out)[:, :-1].log_softmax(-1)
    loss = -log_p.gather(-1, tokens[:, 1:, None]).mean()
    loss.backward()

    reference = AutoModelForCausalLM.from_pretrained(folder)
    reference.train(False)
    reference(tokens, labels=tokens).loss.backward()
    for name, weight in weights.items():
        expected = reference.get_submodule(name).weight.grad
        assert expected is not None
        assert weight.grad is not None
        assert torch.allclose(weight.grad, expected, atol=1e-6 + 1e-4 * float(expected.abs().max()))


def test_logits_of_a_slice_are_the_slice_of_the_logits(folder: Path) -> None:
    model = streamed(folder)
    hidden = torch.randn(2, 20, model.plan.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model.logits(hidden[:, 5:9]), model.logits(hidden)[:, 5:9], atol=1e-5)


def test_half_precision_streams_in_half_precision(llama: Path) -> None:
    model, tokens = streamed(llama, torch.bfloat16), some_tokens(2, 16)
    with torch.no_grad():
        block = model.load_block(0)
        hidden = model.run_block(0, block, model.embed(tokens))
    assert hidden.dtype == torch.bfloat16
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}


def test_the_skeleton_holds_no_block_weights(llama: Path) -> None:
    model = streamed(llama)
    run_all(model, some_tokens(1, 8))
    held = {id(p): p for p in model._skeleton.parameters() if not p.is_meta}
    embedding_and_norm = VOCABULARY * 160 + 160
    assert sum(p.numel() for p in held.values()) == embedding_and_norm


def test_capture_sees_what_the_linears_read(folder: Path) -> None:
    """Weight times captured input reproduces the captured module's output."""
    model, tokens = streamed(folder), some_tokens(3, 10)
    block = model.load_block(0)
    modules = model.linears(block, 0)
    chosen = {group[0]: modules[group[0]] for group in model.plan.siblings(0)}
    outputs: dict[str, torch.Tensor] = {}
    for name, module in chosen.items():
        module.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        hidden = model.embed(tokens)
        capture_inputs(
            chosen, lambda: model.run_block(0, block, hidden), lambda n, x: seen.update({n: x})
        )
    assert list(seen) == list(chosen)
    for name, x in seen.items():
        assert x.shape == (30, weight_of(modules[name]).shape[1])
        bias = modules[name].bias
        y = x @ weight_of(modules[name]).T + (0 if bias is None else bias)
        assert torch.allclose(y, outputs[name].reshape(30, -1), atol=1e-5)
    seen.clear()
    with torch.no_grad():
        model.run_block(0, block, hidden)
    assert not seen


def test_set_weight_changes_the_block_and_not_the_source(llama: Path) -> None:
    model, tokens = streamed(llama), some_tokens(1, 8)
    with torch.no_grad():
        hidden = model.embed(tokens)
        block = model.load_block(0)
        before = model.run_block(0, block, hidden)
        for module in model.linears(block, 0).values():
            set_weight(module, torch.zeros_like(weight_of(module)))
        assert torch.equal(model.run_block(0, block, hidden), hidden)
        assert torch.equal(model.run_block(0, model.load_block(0), hidden), before)


def test_conv1d_weights_are_rows_of_outputs(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    )
    model = streamed(save_tiny(tmp_path / "gpt2", config))
    module = model.linears(model.load_block(0), 0)["transformer.h.0.attn.c_attn"]
    assert weight_of(module).shape == (3 * 64, 64)
    new = torch.randn(3 * 64, 64, generator=torch.Generator().manual_seed(0))
    set_weight(module, new)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(module(x), x @ new.T + module.bias, atol=1e-5)


def rewrite(source: Path, target: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """Copy a tiny model with some tensors replaced or, where None, removed."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_tensor_that_is_gone_since_the_plan_is_named(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    bad = rewrite(llama, tmp_path / "m", {name: None})
    plan = make_plan(llama, SPEC)
    model = StreamedModel(bad, plan, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ModelError, match=rf"no tensor '{name}'") as caught:
        model.load_block(1)
    assert caught.value.code == "missing_tensor"


def test_tensor_of_another_shape_than_planned_is_named(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    bad = rewrite(llama, tmp_path / "m", {name: torch.zeros(255, 160)})
    plan = make_plan(llama, SPEC)
    model = StreamedModel(bad, plan, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ModelError, match=r"up_proj.*\(255, 160\).*\(256, 160\)"):
        model.load_block(0)


def test_nan_weights_are_refused_by_name_and_row(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    weight = torch.zeros(160, 160)
    weight[7, 3] = float("nan")
    model = streamed(rewrite(llama, tmp_path / "m", {name: weight}))
    with pytest.raises(ModelError, match=r"o_proj.*1 of 160 rows \(first: row 7\)") as caught:
        model.load_block(0)
    assert caught.value.code == "non_finite_weights"


def test_config_that_transformers_refuses_is_an_input_error(llama: Path, tmp_path: Path) -> None:
    folder = rewrite(llama, tmp_path / "m", {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "evaluate(code)"}))
    with pytest.raises(ModelError, match=r"cannot build a llama model.*evaluate") as caught:
        streamed(folder)
    assert caught.value.code == "bad_config"


def test_untied_head_that_is_stored_is_used(llama: Path, tmp_path: Path) -> None:
    """As in transformers: a stored head wins over the config's promise of a tie."""
    head = torch.randn(VOCABULARY, 160, generator=torch.Generator().manual_seed(5))
    folder = rewrite(llama, tmp_path / "m", {"lm_head.weight": head})
    tokens = some_tokens(1, 8)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.allclose(
            run_all(streamed(folder), tokens), reference(tokens).logits, atol=1e-5
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_an_accelerator_one_block_at_a_time(dtype: torch.dtype, tmp_path: Path) -> None:
    """The logits of the whole model there, with a fraction of its memory.

    Fused norms and rotations round less often than transformers' own in half precision, so there
    both are held to the logits in fp32.
    """
    device = torch.device("cuda")
    folder = tiny_llama(
        tmp_path / "m", num_hidden_layers=16, hidden_size=512, head_dim=128, intermediate_size=2048
    )
    tokens = some_tokens(2, 64).to(device)
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    model = StreamedModel(folder, make_plan(folder, SPEC), device=device, dtype=dtype)
    with torch.no_grad():
        logits = run_all(model, tokens)
    peak = torch.cuda.max_memory_allocated() - start
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    with torch.no_grad():
        expected = reference(tokens).logits
    exact = reference.float()(tokens).logits.detach()
    missed, allowed = ((value - exact).norm() / exact.norm() for value in (logits, expected))
    assert missed <= 1.1 * allowed + 1e-4
    reference.to(dtype)
    whole = sum(p.numel() * p.element_size() for p in reference.parameters())
    assert peak < whole / 2
    model.close()
