"""Experts that calibration reaches with few tokens or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, Qwen3MoeConfig

from bitmill.allocation.allocator import allocate
from bitmill.calibration.hessian import HessianAccumulator
from bitmill.calibration.loss_weights import GradientEnergies
from bitmill.calibration.statistics import BlockState, Stream, collect
from bitmill.calibration.undersampled_experts import fill_squares, filled_means, is_starved
from bitmill.calibration.windows import CalibrationSet
from bitmill.config.quantization import parse_config
from bitmill.models.streamed import StreamedModel, weight_of
from bitmill.plan.model_plan import make_plan
from bitmill.quant.grid import ClipSettings
from bitmill.refinement.block import RefineSettings, refine_block
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.sensitivity.fisher import SensitivitySettings, profile_knapsack
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.gptq.solve import GptqSolver
from solving import quantize_gptq, quantize_rtn
from tiny import VOCABULARY, save_tiny

LAYER = "model.layers.0.mlp.experts"
MOE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}
CONFIGS = {
    "mixtral": MixtralConfig(**MOE, num_local_experts=5),
    "qwen3_moe": Qwen3MoeConfig(**MOE, moe_intermediate_size=96, num_experts=5),
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Routers whose rows are (0, v, -v, u, -u): expert 0 is never among the best two."""
    folder: Path = save_tiny(tmp_path_factory.mktemp("moe") / "model", CONFIGS[request.param])
    tensors = load_file(folder / "model.safetensors")
    (router,) = (name for name in tensors if name.endswith(".gate.weight"))
    v, u = tensors[router][0].clone(), tensors[router][1].clone()
    tensors[router] = torch.stack([torch.zeros_like(v), v, -v, u, -u])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    spec = parse_config(
        {
            "budget": {"code_bits": 3},
            "allocation": {"widths": [2, 3, 4], "order": "natural"},
        }
    )
    plan = make_plan(folder, spec)
    streamed = StreamedModel(folder, plan, device=torch.device("cpu"), dtype=torch.float32)
    return streamed, spec


def tokens(count: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (count, 40), generator=torch.Generator().manual_seed(0))


def accumulator(x: torch.Tensor) -> HessianAccumulator:
    sums = HessianAccumulator(x.shape[1], "cpu")
    if len(x):
        sums.add(x)
    return sums


def test_second_moments_are_filled_up_to_as_many_tokens_as_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(n, 8, generator=generator) for n in (0, 3, 20)]
    for part, layer in (("gate_proj", None), ("down_proj", torch.eye(8))):
        inputs = {f"{LAYER}.{e}.{part}": accumulator(one) for e, one in enumerate(x)}
        inputs["model.layers.0.self_attn.o_proj"] = accumulator(x[1])
        found = filled_means(inputs)
        seen = torch.cat(x)
        mean = seen.T @ seen / len(seen)
        if layer is not None:
            mean = layer * mean.diagonal().mean()
        assert set(found) == {f"{LAYER}.{e}.{part}" for e in (0, 1)}
        torch.testing.assert_close(found[f"{LAYER}.0.{part}"], mean)
        expected = (x[1].T @ x[1] + 5 * mean) / 8
        torch.testing.assert_close(found[f"{LAYER}.1.{part}"], expected)


def test_diagonals_are_filled_up_as_whole_matrices_are() -> None:
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(n, 8, generator=generator) for n in (0, 3, 20)]
    for part in ("gate_proj", "down_proj"):
        names = [f"{LAYER}.{e}.{part}" for e in range(3)]
        whole = filled_means({n: accumulator(one) for n, one in zip(names, x, strict=True)})
        sums = {n: HessianAccumulator(8, "cpu", diagonal=True) for n in names}
        for name, one in zip(names[1:], x[1:], strict=True):
            sums[name].add(one)
        found = filled_means(sums)
        assert found.keys() == whole.keys()
        for name, diagonal in found.items():
            torch.testing.assert_close(diagonal, whole[name].diagonal())


def test_a_layer_without_tokens_is_rounded() -> None:
    nothing = {f"{LAYER}.{e}.gate_proj": accumulator(torch.empty(0, 8)) for e in range(2)}
    found = filled_means(nothing)
    assert all(torch.equal(H, torch.eye(8)) for H in found.values())


def test_gradients_are_filled_up_and_count_as_often_as_the_expert_was_chosen() -> None:
    names = [f"{LAYER}.{e}.up_proj" for e in range(3)]
    sums = [accumulator(torch.randn(n, 8)) for n in (0, 2, 18)]
    inputs = dict(zip(names, sums, strict=True))
    squares = [torch.zeros(2), torch.tensor([4.0, 0.0]), torch.tensor([36.0, 40.0])]
    found = fill_squares(dict(zip(names, squares, strict=True)), inputs)
    per_token = (0 + 2 + 38) / 20
    assert found[names[0]].tolist() == [per_token, per_token]
    filled = [(4 + 6 * per_token) / 8 * 2, 6 * per_token / 8 * 2]
    assert found[names[1]].tolist() == pytest.approx(filled)
    assert torch.equal(found[names[2]], squares[2])


def test_rows_of_starved_experts_count_nearly_alike(model: Any) -> None:
    """One token says little of how the loss feels each row, and none says nothing."""
    streamed, _ = model
    draw = torch.Generator().manual_seed(0)
    energies, names = GradientEnergies(), [f"{LAYER}.{e}.up_proj" for e in range(3)]
    gradients = [torch.randn(n, 96, generator=draw) for n in (0, 1, 80)]
    for name, gradient in zip(names[1:], gradients[1:], strict=True):
        energies.seen(name, torch.zeros(len(gradient), 64), gradient)
    found = energies.weights(streamed.plan, 0, 40)
    own = [(g.square() / g.norm(dim=1, keepdim=True)).sum(0).double() for g in gradients]
    mean = float(sum(own).mean()) / 81
    assert set(found.rows) == {f"{LAYER}.{e}.up_proj" for e in range(5)}
    assert found.rows[names[0]].tolist() == pytest.approx([mean] * 96)
    filled = ((own[1] + 63 * mean) / 64).float()
    torch.testing.assert_close(found.rows[names[1]], filled)
    torch.testing.assert_close(found.rows[names[2]], (own[2] / 80).float())
    assert not found.tokens


def test_refinement_counts_tokens_and_says_which_expert_starved(model: Any, tmp_path: Path) -> None:
    streamed, spec = model
    some = tokens(6)
    profile = profile_knapsack(streamed, some, streamed.plan, SensitivitySettings(widths=(2, 3, 4)))
    for linear in profile.linears:
        assert torch.from_numpy(linear.costs).isfinite().all()
        assert linear.costs.min() > 0, linear.name
    widths = allocate(streamed.plan, spec, profile)
    refine_model(
        streamed,
        RefineInputs(CalibrationSet(some[:4], some[4:], ""), widths, {}),
        spec.method,
        tmp_path,
        seed=0,
        on_unit=lambda *_: None,
    )
    linears = {li.name: li for li in RefinedModel(tmp_path, streamed.plan).reports()[0]}
    assert linears[f"{LAYER}.0.gate_proj"].tokens == 0
    seen = [linears[f"{LAYER}.{e}.down_proj"].tokens for e in range(5)]
    assert sum(n or 0 for n in seen) == 4 * 40 * 2
    for name, linear in linears.items():
        starved = is_starved(name, linear.tokens or 0, streamed.plan.by_name[name].columns)
        assert any("starved expert" in note for note in linear.notes) == starved
        assert linear.relative_error > 0
    assert linears[f"{LAYER}.0.up_proj"].notes == (
        "starved expert: fewer tokens than its 64 columns, filled up with the layer's mean input",
    )


def test_an_expert_without_tokens_uses_the_layers_input_and_rounds_the_rest(model: Any) -> None:
    streamed, _ = model
    stream = Stream(streamed.embed(tokens(6)))
    quick = GptqSettings(
        clip=ClipSettings(zero_offsets=(), least_squares=0), compensated=None, rounds=0
    )
    widths = {li.name: (3,) for li in streamed.plan.block_linears(0)}
    block = streamed.load_block(0)
    weights, _ = refine_block(
        streamed, 0, block, stream, widths, RefineSettings(GptqSolver(quick), batch=6)
    )
    fresh = streamed.load_block(0)
    names = streamed.linears(fresh, 0)
    for name, module in names.items():
        if "self_attn" in name:
            weight_of(module).data.copy_(weights[name].dequantize())
    experts = [f"{LAYER}.{e}.gate_proj" for e in range(5)]
    state = BlockState(streamed, 0, fresh, None, names)
    found = collect(state, [[name] for name in experts], stream, batch=6)
    routed = sum(found[name].tokens for name in experts)
    layer = sum(found[name].H * found[name].tokens for name in experts[1:]) / routed
    expected, _ = quantize_gptq(
        weight_of(names[experts[0]]).detach(), layer, widths[experts[0]], settings=quick
    )
    assert (weights[experts[0]].codes == expected.codes).float().mean() > 0.99
    down = f"{LAYER}.0.down_proj"
    rounded, _ = quantize_rtn(
        weight_of(names[down]).detach(), widths[down], H=torch.eye(96), order=None, clip=quick.clip
    )
    assert torch.equal(weights[down].codes, rounded.codes)
