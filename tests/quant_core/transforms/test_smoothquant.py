"""Transform "smoothquant": scales that take outliers from activations into weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmill.calibration.hooks import observe
from bitmill.calibration.statistics import Stream
from bitmill.config.quantization import parse_config
from bitmill.errors import SpecError
from bitmill.models.streamed import StreamedModel, weight_of
from bitmill.pipeline.job import run_job
from bitmill.plan.model_plan import make_plan
from bitmill.refinement.folding import fold_scales
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.transforms.channels import ChannelInputs
from bitmill.transforms.smoothquant.scaling import SmoothScaling
from bitmill.transforms.smoothquant.settings import SmoothQuant
from rank_function import on_ranks
from tiny import tiny_llama

TEXT = {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")}
SMOOTH = [{"name": "smoothquant"}]


def config(**changes: Any) -> Any:
    base: dict[str, Any] = {
        "budget": {"code_bits": 8},
        "allocation": {"method": "uniform", "order": "natural", "widths": [8]},
        "refinement": {"method": "rtn", "transforms": SMOOTH},
        "calibration": {"text": TEXT, "sequences": 4, "length": 64, "held_out": 0},
        "evaluation": {"texts": ["wiki_evaluation"], "sequences": 2, "length": 64},
        "threads": 1,
    }
    return parse_config(base | changes)


def uneven_llama(folder: Path) -> Path:
    """Its norms put out a few large channels."""
    file = tiny_llama(folder) / "model.safetensors"
    weights = load_file(file)
    for name, factors in weights.items():
        if name.endswith("layernorm.weight"):
            factors[5::64] *= 30
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def opened(folder: Path) -> StreamedModel:
    plan = make_plan(folder, config())
    return StreamedModel(folder, plan, device=torch.device("cpu"), dtype=torch.float32)


def windows() -> Tensor:
    return torch.randint(2, 250, (4, 24), generator=torch.Generator().manual_seed(0))


def folded(
    folder: Path, ranks: Ranks = SINGLE, batch: int = 2, ordered: bool = False
) -> dict[str, Tensor]:
    """Weights of the first block with its scales folded, by name; of windows divided by ranks.

    ordered: groups are formed in another order of columns.
    """
    model = opened(folder)
    block = model.load_block(0)
    widths = {linear.name: (8,) * linear.shape.groups for linear in model.plan.block_linears(0)}
    stream = Stream(model.embed(ranks.shard(windows())), group=ranks)
    scaling = SmoothScaling(SmoothQuant())
    orders = {}
    if ordered:
        columns = {one.name: one.columns for one in model.plan.block_linears(0)}
        orders = {name: torch.arange(K).roll(K // 3).flip(0) for name, K in columns.items()}
    fold_scales(model, 0, block, stream, widths, orders, scaling, batch=batch)
    return {name: value.detach().clone() for name, value in block.state_dict().items()}


def test_scales_are_those_of_the_publication() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(9, 30, generator=generator) for name in "ab"}
    largest = torch.rand(30, generator=generator) + 0.1
    inputs = ChannelInputs(torch.full((30, 30), torch.nan), largest)
    largest_weight = torch.cat(list(weights.values())).abs().max(0).values
    for alpha in (0.0, 0.5, 0.8, 1.0):
        found = SmoothScaling(SmoothQuant(alpha=alpha)).scales(weights, {}, inputs, SINGLE)
        expected = largest**alpha / largest_weight ** (1 - alpha)
        ratio = found / expected  # a factor of all channels changes no rounding
        assert torch.allclose(ratio, ratio[0].expand(30), rtol=1e-5)


def test_dead_channels_and_empty_weights_take_finite_scales() -> None:
    weights = {"a": torch.randn(9, 30, generator=torch.Generator().manual_seed(0))}
    weights["a"][:, 4] = 0
    largest = torch.ones(30).index_fill(0, torch.tensor([4, 6]), 0.0)
    for W in (weights, {"a": torch.zeros(9, 30)}):
        for sizes in (largest, torch.zeros(30)):
            inputs = ChannelInputs(torch.eye(30), sizes)
            found = SmoothScaling(SmoothQuant()).scales(W, {}, inputs, SINGLE)
            assert torch.isfinite(found).all()
            assert (found > 0).all()


def test_inputs_and_weights_of_every_channel_are_equally_large_at_a_half(tmp_path: Path) -> None:
    """max |x_j| / s_j = max |w_j| s_j, up to one factor for all channels of an input."""
    folder = uneven_llama(tmp_path)
    model = opened(folder)
    block = model.load_block(0)
    hidden = model.embed(windows())
    plain = model.run_block(0, block, hidden)
    block.load_state_dict(folded(folder))
    assert (model.run_block(0, block, hidden) - plain).norm() < 1e-5 * (plain - hidden).norm()
    linears = model.linears(block, 0)
    for group in model.plan.siblings(0):
        if group[0].endswith(("o_proj", "gate_proj")):
            continue  # heads share values; up_proj has taken the scales of down_proj's input
        x = observe(model, 0, block, {group[0]: linears[group[0]]}, hidden)[group[0]].x
        largest = torch.cat([weight_of(linears[name]) for name in group]).abs().amax(0)
        ratio = x.abs().amax(0) / largest
        assert torch.allclose(ratio, ratio[0].expand(len(ratio)), rtol=1e-3), group


@pytest.mark.parametrize("changes", [{"batch": 1}, {"ordered": True}])
def test_batches_and_column_orders_make_no_difference(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = uneven_llama(tmp_path)
    found = folded(folder, **changes)
    for name, value in folded(folder, batch=4).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def folded_part(group: Ranks, source: str, out: str) -> None:
    """What one rank makes."""
    torch.save(folded(Path(source), group), Path(out) / f"{int(group.first)}.pt")


def test_ranks_find_the_largest_of_all_windows(tmp_path: Path) -> None:
    source = uneven_llama(tmp_path / "source")
    on_ranks(2, folded_part, source, tmp_path)
    expected = folded(source)
    for name in ("0.pt", "1.pt"):
        found = torch.load(tmp_path / name)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.e2e
def test_a_job_loses_less_where_activations_have_few_bits(tmp_path: Path) -> None:
    source = uneven_llama(tmp_path / "source")
    baselines = {"baselines": ["activations-8-absmax"]}
    kl = {}
    for name, transforms in (("plain", []), ("smooth", SMOOTH)):
        asked = config(
            refinement={"method": "gptq", "transforms": transforms},
            evaluation=config().evaluation.model_dump(mode="json") | baselines,
        )
        result = run_job(asked, source, tmp_path / f"w-{name}", tmp_path / name)
        kl[name] = [row.texts["wiki_evaluation"].kl for row in result.quality.rows[1:]]
    (_, plain), (_, smooth) = kl["plain"], kl["smooth"]
    assert smooth < 0.5 * plain
    stored, before = (load_file(folder / "model.safetensors") for folder in (result.folder, source))
    norms = [name for name in before if name.endswith("layernorm.weight")]
    assert not any(torch.equal(stored[name], before[name]) for name in norms)


@pytest.mark.parametrize("method", ["hqq", "omniquant"])
def test_methods_that_look_at_no_inputs_or_take_no_transforms_refuse_it(method: str) -> None:
    with pytest.raises(SpecError, match=re.escape(f"method '{method}'")):
        config(refinement={"method": method, "transforms": SMOOTH})


def test_alpha_lies_between_weights_and_activations() -> None:
    with pytest.raises(SpecError, match="alpha"):
        config(refinement={"transforms": [{"name": "smoothquant", "alpha": 1.5}]})
