"""Weights of tokens and rows by the loss gradient, and what statistics and solvers make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from bitmill.calibration.kept_weights import KEY_NAME, KeptWeights
from bitmill.calibration.loss_weights import LossWeights, loss_weights
from bitmill.calibration.statistics import BlockState, Stream, collect
from bitmill.calibration.windows import CalibrationSet
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.methods import GPTQ, TrellisGPTQ
from bitmill.io.atomic import write_json
from bitmill.models.streamed import weight_of
from bitmill.refinement.model import (
    FORMER_WEIGHTS_NAME,
    WEIGHTS_NAME,
    RefineInputs,
    refine_model,
)
from bitmill.refinement.store import SavedBlock
from bitmill.sensitivity import checkpoint
from bitmill.sensitivity.fisher import profile_knapsack
from learning import tiny

TOKENS = tiny().tokens[:3]


def gradients() -> dict[str, torch.Tensor]:
    """dL/dy [S, T, N] of every linear, by one backward pass through all blocks at once."""
    model, outputs = tiny().model, {}
    with torch.enable_grad():
        hidden = model.embed(TOKENS).requires_grad_()
        for i in range(model.block_count):
            block = model.load_block(i)
            for name, module in model.linears(block, i).items():

                def keep(_, args, output, name=name):
                    output.retain_grad()
                    outputs[name] = output

                module.register_forward_hook(keep)
            hidden = model.run_block(i, block, hidden)
        logits = model.logits(hidden)[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(
            logits, TOKENS[:, 1:].flatten(), reduction="sum"
        ).backward()
    return {name: y.grad for name, y in outputs.items()}


def test_weights_are_powers_of_gradients_over_their_mean() -> None:
    model, expected = tiny().model, gradients()
    usual, squares = loss_weights(model, TOKENS), loss_weights(model, TOKENS, power=2)
    for i in range(model.block_count):
        for names in model.plan.siblings(i):
            for found, power in ((usual, 1), (squares, 2)):
                sizes = [expected[name].norm(dim=-1) for name in names]
                each = [size**power / (size**power).mean() for size in sizes]
                mean = sum(each) / len(each)
                torch.testing.assert_close(found.tokens[names[0]], mean, rtol=1e-3, atol=1e-5)
                for name, size in zip(names, sizes, strict=True):
                    rows = expected[name].square() * size.clamp(min=1e-30)[..., None] ** (power - 2)
                    rows = rows.mean((0, 1))
                    torch.testing.assert_close(found.rows[name], rows, rtol=1e-3, atol=1e-12)
    assert len(usual.tokens) == len(squares.tokens) == 4 * model.block_count
    assert len(usual.rows) == len(model.plan.linears)
    for none in (TOKENS[:0], TOKENS[:, :1]):
        assert loss_weights(model, none) == LossWeights({}, {})


def test_statistics_are_means_over_weighted_tokens() -> None:
    model = tiny().model
    groups = [list(names) for names in model.plan.siblings(0)]
    weights = {names[0]: torch.rand(TOKENS.shape) for names in groups}
    hidden = model.embed(TOKENS)
    source = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))

    def statistics(hidden, source, weights):
        block = model.load_block(0)
        state = BlockState(model, 0, block, model.load_block(0), model.linears(block, 0))
        return collect(state, groups, Stream(hidden, source, weights=weights), batch=2)

    found = statistics(hidden, source, weights)
    # Windows counted once and twice are weights of 1 and 2.
    twice = {names[0]: torch.tensor([[1.0], [2.0], [0.0]]).expand(3, 24) for names in groups}
    counted = statistics(hidden, source, twice)
    some = torch.tensor([0, 1, 1])
    plain = statistics(hidden[some], source[some], {})
    for name, one in counted.items():
        other = plain[name]
        torch.testing.assert_close(one.H, other.H, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.shift, other.shift, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one.energy, other.energy, rtol=1e-3, atol=1e-6)
        assert not torch.allclose(found[name].H, other.H, rtol=1e-3)


def assert_equal(found: LossWeights, expected: LossWeights) -> None:
    own, other = found.tensors(), expected.tensors()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in other)


@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
def test_a_profile_leaves_the_weights_that_a_pass_of_their_own_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Also one that was killed and goes on behind its saved gradient, or from the top where the
    weights of blocks that were finished are gone."""
    monkeypatch.setattr(checkpoint, "GRADIENT_SECONDS", 0.0)
    model, expected = tiny().model, loss_weights(tiny().model, TOKENS)
    kept = KeptWeights(tmp_path / "weights", "these windows")

    class Killed(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == total - 1:
            raise Killed

    def profile(**changes):
        return profile_knapsack(
            model, TOKENS, model.plan, folder=tmp_path / "profile", weights=kept, **changes
        )

    with pytest.raises(Killed):
        profile(on_block=stop)
    assert kept.load(model.block_count) is None
    assert list((tmp_path / "profile").glob("gradient-*"))
    if lost:
        kept.remove()
    profile()
    assert not list((tmp_path / "profile").glob("gradient-*"))
    found = kept.load(model.block_count)
    assert found is not None
    assert_equal(found, expected)
    other = KeptWeights(kept.folder, "other windows")
    assert other.load(model.block_count) is None
    other.save(0, LossWeights({}, {}))
    assert not kept.has(0)
    assert not other.has(1)


@pytest.mark.parametrize("key", ["these windows", {"key": "these windows", "power": 2.0}])
def test_weights_that_were_left_as_squares_count_for_nothing(tmp_path: Path, key: object) -> None:
    kept = KeptWeights(tmp_path / "weights", "these windows")
    kept.save(0, LossWeights({"a": torch.ones(1, 2)}, {}))
    assert kept.has(0)
    write_json(kept.folder / KEY_NAME, key)
    assert not kept.has(0)
    assert kept.load(1) is None


def test_methods_that_ask_for_them_keep_them_for_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "gradient" in TrellisGPTQ().needs
    assert "gradient" not in GPTQ().needs

    class Weighted(GPTQ):
        @property
        def needs(self):
            return super().needs | {"gradient"}

    model = tiny().model
    tokens = CalibrationSet(TOKENS, tiny().held_out[:1], "", "none")
    inputs = RefineInputs(tokens, BitWidthMap.uniform(model.plan.shapes, 3), {})

    def reports(folder: Path, method: GPTQ, weights: KeptWeights | None = None) -> list[bytes]:
        folder.mkdir(exist_ok=True)
        refine_model(
            model, inputs, method, folder, seed=0, on_unit=lambda *_: None, weights=weights
        )
        return [file.read_bytes() for file in sorted(folder.glob("block-*.json"))]

    quick = {"compensated_grid": False, "scale_refit": False}
    whole = reports(tmp_path / "a", Weighted(**quick))
    used = LossWeights.of_tensors(safetensors.torch.load_file(tmp_path / "a" / WEIGHTS_NAME))
    expected = loss_weights(model, TOKENS, power=1)
    calibration = {name: size[: len(TOKENS)] for name, size in used.tokens.items()}
    assert_equal(LossWeights(calibration, used.rows), expected)
    assert whole != reports(tmp_path / "plain", GPTQ(**quick))
    kept, every = KeptWeights(tmp_path / "kept", ""), loss_weights(model, TOKENS)
    for i in range(model.block_count):
        names = [linear.name for linear in model.plan.block_linears(i)]
        tokens = {name: every.tokens[name] for name in names if name in every.tokens}
        kept.save(i, LossWeights(tokens, {name: every.rows[name] for name in names}))

    def of_held_out(model, tokens, **_):
        assert not torch.equal(tokens, TOKENS)
        return loss_weights(model, tokens)

    def of_no_window(model, tokens, **_):
        assert not len(tokens), "held-out windows judge corrections, and here there are none"
        return LossWeights({}, {})

    monkeypatch.setattr("bitmill.refinement.model.loss_weights", of_held_out)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / FORMER_WEIGHTS_NAME).write_bytes(b"of an earlier version")
    assert reports(tmp_path / "b", Weighted(**quick), kept) == whole
    monkeypatch.setattr("bitmill.refinement.model.loss_weights", of_no_window)
    reports(tmp_path / "c", Weighted(**quick, asymmetric=False), kept)
    assert not (tmp_path / "b" / FORMER_WEIGHTS_NAME).exists()
    (tmp_path / "a" / "block-00001.json").unlink()
    monkeypatch.setattr(
        "bitmill.refinement.model.loss_weights", lambda *_, **__: pytest.fail("made again")
    )
    assert reports(tmp_path / "a", Weighted(**quick)) == whole


def test_rows_are_weighed_where_trellis_codes_are_searched_for(tmp_path: Path) -> None:
    model, every = tiny().model, loss_weights(tiny().model, TOKENS)
    tokens = CalibrationSet(TOKENS, TOKENS[:0], "", "none")
    inputs = RefineInputs(tokens, BitWidthMap.uniform(model.plan.shapes, 2), {})
    codes = []
    counts = {name: 16.0 ** (torch.arange(len(q)) % 16 < 8) for name, q in every.rows.items()}
    for name, rows in (("both", counts), ("tokens", {})):
        folder = tmp_path / name
        folder.mkdir()
        given = LossWeights(every.tokens, rows).tensors()
        (folder / WEIGHTS_NAME).write_bytes(safetensors.torch.save(given))
        refine_model(
            model, inputs, TrellisGPTQ(), folder, seed=0, on_unit=lambda *_: None, blocks=1
        )
        block = SavedBlock(folder, model.plan, 0)
        codes.append({one.name: block.packed(one.name) for one in model.plan.block_linears(0)})
    for name, both in codes[0].items():
        W, of_tokens = weight_of(model.linears(model.load_block(0), 0)[name]), codes[1][name]
        errors = [(one.dequantize() - W).square().sum(1) for one in (both, of_tokens)]
        assert counts[name] @ errors[0] < 0.8 * counts[name] @ errors[1], name
