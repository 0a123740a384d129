from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitmill.calibration.gradients import GradientPass, PassSettings
from bitmill.errors import CalibrationError
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import make_plan
from bitmill.quant.codes import group_slices
from bitmill.quant.grid import clip_search, nearest_codes, values
from bitmill.quant.rewrites import Rewrites
from bitmill.runtime.process import computing
from bitmill.sensitivity import checkpoint as profile_checkpoint
from bitmill.sensitivity.fisher import (
    PROFILE_CLIP,
    BlockMoments,
    SensitivitySettings,
    linear_costs,
    profile_knapsack,
    sample_rows,
)
from bitmill.solvers.gptq.curvature import Curvature
from bitmill.solvers.gptq.settings import GptqSettings
from solving import quantize_gptq
from streaming import SPEC, Watched, streamed
from tiny import VOCABULARY, save_tiny, tiny_llama, tiny_opt
from tiny_architectures import tiny_config

QUICK = SensitivitySettings(widths=(2, 4), rows=16, gradients=PassSettings(batch=3))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=3)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_opt(tmp_path_factory.mktemp("opt") / "model")


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that bends its logits: tanh(logits / 30) * 30."""
    return save_tiny(tmp_path_factory.mktemp("gemma2") / "model", tiny_config("gemma2"))


def some_tokens(windows: int = 5, length: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCABULARY, (windows, length), generator=generator)


class Recorder:
    """Keeps every input and gradient of one block."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.gradients: dict[str, list[Tensor]] = {}

    def seen(self, name: str, x: Tensor, gradient: Tensor) -> None:
        self.inputs.setdefault(name, []).append(x.clone())
        self.gradients.setdefault(name, []).append(gradient.clone())


def autograd_reference(folder: Path, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and loss gradients [S * T, .] of every linear, from one plain backward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def watch(name):
        def hook(_, args, output):
            inputs[name] = args[0].detach().reshape(-1, args[0].shape[-1])
            output.register_hook(
                lambda g: gradients.__setitem__(name, g.reshape(-1, g.shape[-1]).clone())
            )

        return hook

    for name in make_plan(folder, SPEC).by_name:
        model.get_submodule(name).register_forward_hook(watch(name))
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").backward()
    return inputs, gradients


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("batch", [2, 8])
def test_streamed_gradients_equal_autograd(family, batch, request, monkeypatch):
    monkeypatch.setattr("bitmill.calibration.gradients.LOGIT_VALUES", 7 * 2 * VOCABULARY)
    folder, tokens = request.getfixturevalue(family), some_tokens()
    expected_inputs, expected_gradients = autograd_reference(folder, tokens)
    model = streamed(folder)
    recorder = Recorder()
    GradientPass(model, tokens, PassSettings(batch=batch)).run(lambda _: recorder)
    assert recorder.inputs.keys() == expected_inputs.keys()
    for name, expected in expected_gradients.items():
        found = torch.cat(recorder.gradients[name])
        torch.testing.assert_close(
            found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
        )
        x = torch.cat(recorder.inputs[name])
        torch.testing.assert_close(x, expected_inputs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_at_the_last_output_is_autograds(capped, dtype, monkeypatch):
    monkeypatch.setattr("bitmill.calibration.gradients.LOGIT_VALUES", 7 * 3 * VOCABULARY)
    model, tokens = streamed(capped, dtype=dtype), some_tokens()
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(*tokens.shape, model.plan.hidden_size, generator=generator).to(dtype)
    found = torch.full_like(output, math.nan)
    GradientPass(model, tokens, PassSettings(batch=3))._head_gradient(output, found)
    expected = head_gradient(model, tokens, output)
    assert not expected[:, -1].any()
    rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (2e-2, 4e-3)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol * float(expected.abs().max()))


def head_gradient(model, tokens, output):
    """What `_head_gradient` writes, by autograd through the loss."""
    gradient = torch.zeros_like(output)
    x = output[:, :-1].clone().requires_grad_()
    logits = model.logits(x).float().flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    gradient[:, :-1] = torch.autograd.grad(loss, x)[0]
    return gradient


def test_moments_are_the_documented_means():
    generator = torch.Generator().manual_seed(0)
    x, ga, gb = (torch.randn(50, k, generator=generator) for k in (12, 4, 6))
    moments = BlockMoments([["a", "b"]], {"a": (4, 12), "b": (6, 12)}, torch.device("cpu"))
    for part in (slice(0, 20), slice(20, 50)):
        moments.seen("b", x[part], gb[part])
        moments.seen("a", x[part], ga[part])
    moments.fill()
    torch.testing.assert_close(moments.energy("b"), x.square().mean(0))
    torch.testing.assert_close(moments.row_weight("b", 40), gb.double().square().sum(0) / 40)
    importance = gb.square().sum(1)
    expected = (x.T * importance) @ x / importance.sum()
    torch.testing.assert_close(moments.weighted("b"), expected)


def some_linear(rows: int = 24, columns: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """W, H with correlated columns, and row weights."""
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(rows, columns, generator=generator)
    x = torch.randn(900, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    x = x * torch.rand(columns, generator=generator).exp()
    return W, x.T @ x / 900, torch.rand(rows, generator=generator).double()


def test_costs_are_what_gptq_leaves_once_later_columns_have_compensated():
    """Independent: fp64, one column at a time, in the Schur complement of a group's later columns.

    Rounding to the same grids without compensation costs more.
    """
    W, H, q = some_linear()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    rewrites = Rewrites.of_order(order)
    curvature = Curvature.prepare(rewrites.hessian(H))
    settings = SensitivitySettings(widths=(1, 2, 3))
    costs = linear_costs(W, q, curvature, settings, rewrites)
    packed, inner = W[:, order], H[order][:, order]
    damped = inner.double() + curvature.factor.damping * inner.diagonal().mean() * torch.eye(300)
    for group, part in group_slices(300):
        left = torch.linalg.inv(damped[part.start :, part.start :])
        schur = torch.linalg.inv(left[: part.stop - part.start, : part.stop - part.start])
        block = packed[:, part].contiguous()
        for column, width in enumerate(settings.widths):
            clip = PROFILE_CLIP[width]
            grid = clip_search(block, width, inner.diagonal()[part], settings=clip)
            d = block.double() - column_by_column(block, grid, width, torch.linalg.inv(schur))
            expected = 0.5 * (q * ((d @ schur) * d).sum(1)).sum()
            assert costs[group, column] == pytest.approx(float(expected), rel=0.01)
            d = (block - values(nearest_codes(block, grid, width), grid)).double()
            rounded = 0.5 * (q * ((d @ damped[part, part]) * d).sum(1)).sum()
            assert costs[group, column] < float(rounded)


def test_dropped_groups_cost_all_of_their_energy():
    W, H, q = some_linear()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    rewrites = Rewrites.of_order(order)
    curvature = Curvature.prepare(rewrites.hessian(H))
    costs = linear_costs(W, q, curvature, SensitivitySettings(widths=(0, 1, 2)), rewrites)
    same = linear_costs(W, q, curvature, SensitivitySettings(widths=(1, 2)), rewrites)
    np.testing.assert_array_equal(costs[:, 1:], same)
    for group, part in group_slices(300):
        without = W.double()
        without[:, order[: part.start]] = without[:, order[part.stop :]] = 0
        expected = 0.5 * (q * ((without @ H.double()) * without).sum(1)).sum()
        assert costs[group, 0] == pytest.approx(float(expected), rel=1e-5)
    assert (costs[:, 0] > costs[:, 1]).all()


def column_by_column(W, grid, width, inverse):
    """Textbook GPTQ of W [N, C] on a frozen grid; inverse f64 [C, C] of what is left of H."""
    W, result = W.double().clone(), torch.zeros_like(W, dtype=torch.float64)
    scale, zero = grid.scale.double(), grid.zero.double()
    for j in range(W.shape[1]):
        code = (W[:, j] / scale + zero).round().clamp(0, 2**width - 1)
        result[:, j] = scale * (code - zero)
        error = (W[:, j] - result[:, j]) / inverse[0, 0]
        W[:, j + 1 :] -= error[:, None] * inverse[0, 1:]
        inverse = inverse[1:, 1:] - inverse[1:, :1] * inverse[:1, 1:] / inverse[0, 0]
    return result


@pytest.mark.parametrize("count", [8, 40, 200])
def test_sampled_rows_stand_for_all(count):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(300, generator=generator).mul(2).exp().double()
    chosen, share = sample_rows(weight, count)
    assert len(chosen) <= count
    assert (chosen[1:] > chosen[:-1]).all()
    torch.testing.assert_close(share.sum(), weight.sum())
    value = torch.rand(300, generator=generator).double() + 0.5
    estimate = float((share * value[chosen]).sum() / (weight * value).sum())
    assert estimate == pytest.approx(1, abs=0.3 / count**0.5 + 0.02)
    everything, plain = sample_rows(weight, 300)
    assert everything.tolist() == list(range(300))
    assert torch.equal(plain, weight)


def test_costs_from_a_sample_of_rows_are_close():
    W, H, q = some_linear(rows=96)
    curvature = Curvature.prepare(H)
    whole = linear_costs(W, q, curvature, SensitivitySettings(widths=(2, 4)))
    sampled = linear_costs(W, q, curvature, SensitivitySettings(widths=(2, 4), rows=48))
    np.testing.assert_allclose(sampled, whole, rtol=0.15)
    assert not np.array_equal(sampled, whole)


def test_predicted_loss_is_the_second_order_sum_over_tokens_and_near_the_divergence(llama):
    """One linear at 5 bits: its cost against 1/(2P) sum_t (g_t^T D x_t)^2 and the measured KL.

    The plain mean of x x^T would give 1.5 times the sum at o_proj. KL is not asked of it there: the
    text's own labels say little of what an untrained model predicts.
    """
    model, tokens = streamed(llama), some_tokens(32, 64)
    settings = replace(QUICK, widths=(5,), order="natural", rows=256)
    profile = profile_knapsack(model, tokens, model.plan, settings)
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    plain = GptqSettings(clip=PROFILE_CLIP[5], compensated=None, rounds=0)
    seen = Recorder()
    run = GradientPass(model, tokens, settings.gradients)
    run.run(lambda _: seen)
    with torch.no_grad():
        source = whole(tokens).logits[:, :-1].log_softmax(-1)
        for part in ("1.mlp.down_proj", "2.mlp.up_proj", "0.self_attn.o_proj"):
            name = f"model.layers.{part}"
            module = whole.get_submodule(name)
            W, x = module.weight.detach().clone(), torch.cat(seen.inputs[name])
            widths = (5,) * -(-W.shape[1] // 128)
            quantized = quantize_gptq(W, x.T @ x / len(x), widths, settings=plain)[0].dequantize()
            g = torch.cat(seen.gradients[name])
            changes = ((x @ (quantized - W).T) * g).sum(1)
            second_order = float(changes.square().sum() / (2 * run.predictions))
            predicted = float(profile.linear(name).costs.sum())
            assert predicted == pytest.approx(second_order, rel=0.1)
            if part.endswith("o_proj"):
                continue
            module.weight.copy_(quantized)
            changed = whole(tokens).logits[:, :-1].log_softmax(-1)
            module.weight.copy_(W)
            measured = float((source.exp() * (source - changed)).sum(-1).mean())
            assert 0.6 < predicted / measured < 1.6


def test_profile_covers_the_plan_and_stores_orders(llama):
    model = streamed(llama)
    profile = profile_knapsack(model, some_tokens(), model.plan, QUICK)
    profile.check_shapes(model.plan.shapes)
    assert profile.widths == (2, 4)
    assert all((linear.costs > 0).all() for linear in profile.linears)
    q, k = (profile.linear(f"model.layers.1.self_attn.{n}_proj") for n in "qk")
    assert q.order == k.order == q.name
    recorder = Recorder()
    GradientPass(model, some_tokens(), PassSettings()).run(lambda _: recorder)
    diagonal = torch.cat(recorder.inputs[q.name]).square().sum(0)
    ordered = diagonal[torch.from_numpy(profile.orders[q.name]).long()]
    assert (ordered[:-1] >= ordered[1:] * (1 - 1e-5)).all()
    natural = profile_knapsack(model, some_tokens(), model.plan, replace(QUICK, order="natural"))
    assert not natural.orders
    assert natural.linear(q.name).order is None
    assert natural.key != profile.key


@pytest.mark.parametrize("gradients", [{"every": 2}, {"every": 3}, {"host_bytes": 0}])
def test_memory_settings_do_not_change_a_byte(llama, tmp_path, gradients):
    model = streamed(llama)
    expected = profile_knapsack(model, some_tokens(), model.plan, QUICK).to_bytes()
    settings = replace(QUICK, gradients=replace(QUICK.gradients, **gradients))
    found = profile_knapsack(model, some_tokens(), model.plan, settings, folder=tmp_path)
    assert found.to_bytes() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # its first call, in a thread
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_block_inputs_wait_does_not_change_a_byte_on_a_gpu(llama, tmp_path, dtype):
    plan = make_plan(llama, SPEC)
    model = StreamedModel(llama, plan, device=torch.device("cuda"), dtype=dtype)
    tokens = some_tokens(20, 200)
    expected = profile_knapsack(model, tokens, plan, QUICK).to_bytes()
    for every in (1, 2):
        for limit in (10**9, 0):
            gradients = replace(QUICK.gradients, every=every, host_bytes=limit)
            settings = replace(QUICK, gradients=gradients)
            folder = tmp_path / f"{every}-{limit}"
            found = profile_knapsack(model, tokens, plan, settings, folder=folder)
            assert found.to_bytes() == expected


def test_gradients_come_from_deterministic_kernels(llama):
    model = Watched(llama)
    GradientPass(model, some_tokens(), PassSettings()).run(lambda _: None)
    assert model.forward == model.backward == [True] * len(model.forward)
    assert len(model.forward) >= model.block_count
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_of_long_windows_are_the_same_bits_twice_on_a_gpu(tmp_path):
    sizes = {"hidden_size": 512, "head_dim": 64, "num_attention_heads": 8}
    folder = tiny_llama(
        tmp_path / "model", num_key_value_heads=8, max_position_embeddings=2048, **sizes
    )
    plan = make_plan(folder, SPEC)
    found: list[list[Tensor]] = []
    for _ in range(3):
        model = StreamedModel(folder, plan, device=torch.device("cuda"), dtype=torch.bfloat16)
        own: list[Tensor] = []
        run = GradientPass(model, some_tokens(8, 2048), PassSettings(batch=4))
        with computing():
            run.run(lambda _: None, on_block=lambda _, g, own=own: own.append(g.clone()))
        found.append(own)
    assert len(found[0]) == 2
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


class Killed(Exception):
    pass


@pytest.mark.parametrize(("seconds", "stop"), [(0.0, 2), (0.0, 4), (0.0, 6), (1000.0, 5)])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(llama, tmp_path, monkeypatch, seconds, stop):
    monkeypatch.setattr(profile_checkpoint, "GRADIENT_SECONDS", seconds)
    model, tokens = streamed(llama), some_tokens()
    expected = profile_knapsack(model, tokens, model.plan, QUICK).to_bytes()

    def kill(done: int, total: int) -> None:
        assert total == 6
        if done == stop:
            raise Killed

    with pytest.raises(Killed):
        profile_knapsack(model, tokens, model.plan, QUICK, folder=tmp_path, on_block=kill)
    measured = sorted(path.name for path in tmp_path.glob("block-*.npz"))
    assert len(measured) == max(0, stop - 3)
    stamps = {name: (tmp_path / name).stat().st_mtime_ns for name in measured}
    reports: list[int] = []
    found = profile_knapsack(
        model,
        tokens,
        model.plan,
        QUICK,
        folder=tmp_path,
        on_block=lambda done, _: reports.append(done),
    )
    assert found.to_bytes() == expected
    assert not list(tmp_path.glob("gradient-*"))
    assert all((tmp_path / name).stat().st_mtime_ns == at for name, at in stamps.items())
    backward = [done for done in reports if done > 3]
    if seconds == 0.0 and stop < 6:
        assert backward == list(range(max(stop, 3) + 1, 7))
    if stop == 6:
        assert reports == []


def test_windows_of_one_token_are_refused(llama):
    model = streamed(llama)
    with pytest.raises(CalibrationError, match="at least 2"):
        profile_knapsack(model, some_tokens(3, 1), model.plan, QUICK)


def test_gradients_that_are_not_finite_are_refused(llama, monkeypatch):
    model = streamed(llama)
    load = model.load_block

    def explode(i):
        block = load(i)
        with torch.no_grad():
            next(block.parameters()).fill_(1e38)
        return block

    monkeypatch.setattr(model, "load_block", explode)
    with pytest.raises(CalibrationError):
        profile_knapsack(model, some_tokens(), model.plan, QUICK)


def test_a_gradient_that_overflows_in_one_batch_is_refused(llama, monkeypatch):
    found = iter([math.inf, 1.0, math.nan, 1.0])

    def overflow(self, x, *_):
        return torch.full_like(x, next(found))

    monkeypatch.setattr(GradientPass, "_slice_gradient", overflow)
    model = streamed(llama)
    for _ in range(2):
        run = GradientPass(model, some_tokens(2), PassSettings(batch=1))
        with pytest.raises(CalibrationError, match=f"block {model.block_count - 1} is not finite"):
            run.run(lambda i: None)


def test_the_block_just_passed_serves_for_its_weights(llama: Path) -> None:
    model = streamed(llama)
    plain = GradientPass(model, some_tokens(2), PassSettings())
    plain.run(lambda i: None)
    assert plain.source_block(0) is plain.source_block(0)
    assert plain.source_block(1) is not plain.source_block(1)
