"""Transform "awq": scales that are folded away, found by the error that rounding leaves."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmill.calibration.statistics import Stream
from bitmill.calibration.windows import calibration_tokens
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import parse_config
from bitmill.errors import SpecError
from bitmill.evaluation.compare import from_packed
from bitmill.inference.load import load
from bitmill.models.streamed import StreamedModel, weight_of
from bitmill.pipeline.job import run_job
from bitmill.plan.model_plan import make_plan
from bitmill.refinement.folding import fold_scales, writer_name
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.solvers.rtn import RtnSolver
from bitmill.solvers.solver import Linear
from bitmill.transforms.awq.scaling import AwqScaling, rounding_error
from bitmill.transforms.awq.settings import AWQ
from bitmill.transforms.channels import ChannelInputs
from rank_function import on_ranks
from tiny import save_tiny, tinier_llama, tiny_llama, tiny_opt
from tiny_architectures import tiny_config

TEXT = {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")}


def config(**changes: Any) -> Any:
    base: dict[str, Any] = {
        "budget": {"code_bits": 3},
        "allocation": {"method": "uniform", "order": "natural"},
        "refinement": {"method": "rtn", "transforms": [{"name": "awq"}]},
        "calibration": {"text": TEXT, "sequences": 4, "length": 64, "held_out": 1},
        "evaluation": {"texts": ["wiki_evaluation"], "sequences": 1, "length": 64},
        "threads": 1,
    }
    return parse_config(base | changes)


def opened(folder: Path) -> StreamedModel:
    plan = make_plan(folder, config())
    return StreamedModel(folder, plan, device=torch.device("cpu"), dtype=torch.float32)


def tokens() -> Tensor:
    return torch.randint(2, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def uneven_llama(folder: Path) -> Path:
    """A tiny Llama whose norms put out a few large channels, as those of trained models do."""
    file = tiny_llama(folder) / "model.safetensors"
    weights = load_file(file)
    for name, factors in weights.items():
        if name.endswith("layernorm.weight"):
            factors[5::16] *= 8
    save_file(weights, file, metadata={"format": "pt"})
    return folder


class Uneven:
    """Scales between 1/4 and 4, at random."""

    def scales(
        self, weights: Mapping[str, Tensor], widths: Any, inputs: ChannelInputs, ranks: Any
    ) -> Tensor:
        return torch.exp2(
            4 * torch.rand(len(inputs.H), generator=torch.Generator().manual_seed(1)) - 2
        )


def problem() -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]], Tensor]:
    """Linears whose input has a few large channels."""
    generator = torch.Generator().manual_seed(2)
    size = torch.where(torch.arange(200) % 25 == 3, 30.0, 1.0)
    x = torch.randn(500, 200, generator=generator) * size
    weights = {name: torch.randn(40, 200, generator=generator) for name in "ab"}
    return weights, {"a": (3, 3), "b": (4, 2)}, x.T @ x / 500


def known(H: Tensor) -> ChannelInputs:
    """AWQ looks at second moments alone."""
    return ChannelInputs(H, torch.full_like(H[0], torch.nan))


def test_the_search_takes_what_leaves_least_error() -> None:
    weights, widths, H = problem()
    found = AwqScaling(AWQ()).scales(weights, widths, known(H), SINGLE)
    plain = rounding_error(weights, widths, H, torch.ones(200))
    assert rounding_error(weights, widths, H, found) < 0.75 * plain
    assert found[3::25].min() > found[4::25].max()
    even = AwqScaling(AWQ()).scales(weights, widths, known(torch.eye(200)), SINGLE)
    assert rounding_error(weights, widths, torch.eye(200), even) <= rounding_error(
        weights, widths, torch.eye(200), torch.ones(200)
    )


def test_scales_suit_the_clipped_grids_that_follow() -> None:
    weights, widths, H = problem()
    found = AwqScaling(AWQ()).scales(weights, widths, known(H), SINGLE)
    errors = []
    for scales in (torch.ones(200), found):
        scaled = H / scales / scales[:, None]
        linears = [Linear(name, W * scales, widths[name]) for name, W in weights.items()]
        errors.append(RtnSolver().solve(linears, scaled, SINGLE).errors[:, 2].sum())
    assert errors[1] < 0.93 * errors[0]


def test_dead_channels_and_empty_weights_take_finite_scales() -> None:
    weights, widths, H = problem()
    H[:, 7] = H[7] = 0.0
    weights["a"][:, 9] = weights["b"][:, 9] = 0.0
    found = AwqScaling(AWQ()).scales(weights, widths, known(H), SINGLE)
    assert torch.isfinite(found).all()
    assert (found > 0).all()
    nothing = {name: torch.zeros_like(W) for name, W in weights.items()}
    assert torch.isfinite(AwqScaling(AWQ()).scales(nothing, widths, known(H), SINGLE)).all()


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("llama", {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm"}),
        ("gemma3_text", {"q_proj": "input_layernorm", "gate_proj": "pre_feedforward_layernorm"}),
    ],
)
def test_norms_and_linears_that_write_are_found(
    tmp_path: Path, name: str, folded: dict[str, str]
) -> None:
    model = opened(
        save_tiny(tmp_path, tiny_config(name)) if name != "llama" else tiny_llama(tmp_path)
    )
    block, hidden = model.load_block(0), model.embed(tokens())
    found = {}
    for group in model.plan.siblings(0):
        writer = writer_name(model, 0, block, group, hidden[:1])
        if writer is not None:
            found[group[0].rpartition(".")[2]] = writer[0].rpartition(".")[2]
    assert found == folded | {"down_proj": "up_proj"}  # heads share values: o_proj has no writer
    untouched = model.load_block(0)
    for (_, a), (_, b) in zip(block.named_parameters(), untouched.named_parameters(), strict=True):
        assert torch.equal(a, b)


def test_attention_values_are_scaled_where_every_head_has_its_own(tmp_path: Path) -> None:
    model = opened(tiny_opt(tmp_path))
    block, hidden = model.load_block(0), model.embed(tokens())
    writers = [writer_name(model, 0, block, group, hidden[:1]) for group in model.plan.siblings(0)]
    names = [writer[0].rpartition(".")[2] for writer in writers if writer is not None]
    assert names == ["self_attn_layer_norm", "v_proj", "final_layer_norm", "fc1"]


@pytest.mark.parametrize("name", ["llama", "opt", "gemma3_text", "falcon", "mixtral", "phi3"])
def test_a_block_computes_the_same_with_folded_scales(tmp_path: Path, name: str) -> None:
    makers = {"llama": tiny_llama, "opt": tiny_opt}
    model = opened(
        makers[name](tmp_path) if name in makers else save_tiny(tmp_path, tiny_config(name))
    )
    hidden, plan = model.embed(tokens()), model.plan
    block = model.load_block(0)
    expected = model.run_block(0, block, hidden)
    widths = {linear.name: (3,) * linear.shape.groups for linear in plan.block_linears(0)}
    before = {n: weight_of(m).clone() for n, m in model.linears(block, 0).items()}
    fold_scales(model, 0, block, Stream(hidden), widths, {}, Uneven(), batch=2)
    found = model.run_block(0, block, hidden)
    assert (found - expected).norm() < 1e-5 * (expected - hidden).norm()
    after = {n: weight_of(m) for n, m in model.linears(block, 0).items()}
    assert any(not torch.equal(after[n], before[n]) for n in before)


def test_a_norm_that_a_kept_linear_reads_too_keeps_its_scale(tmp_path: Path) -> None:
    plan = make_plan(
        tiny_llama(tmp_path), config(allocation={"method": "uniform", "keep": ["*.up_proj"]})
    )
    model = StreamedModel(tmp_path, plan, device=torch.device("cpu"), dtype=torch.float32)
    block, hidden = model.load_block(0), model.embed(tokens())
    groups = {group[0].rpartition(".")[2]: group for group in plan.siblings(0)}
    assert groups["gate_proj"] == ["model.layers.0.mlp.gate_proj"]
    assert writer_name(model, 0, block, groups["gate_proj"], hidden[:1]) is None
    assert writer_name(model, 0, block, groups["down_proj"], hidden[:1]) is None
    assert writer_name(model, 0, block, groups["q_proj"], hidden[:1]) is not None


@pytest.mark.e2e
def test_a_job_folds_stores_and_measures_the_same_model(tmp_path: Path) -> None:
    source = uneven_llama(tmp_path / "source")
    asked = {"method": "gptq", "transforms": [{"name": "awq"}]}
    allocation = {"method": "uniform", "order": "activation"}
    result = run_job(
        config(refinement=asked, allocation=allocation), source, tmp_path / "w", tmp_path / "out"
    )
    stored, before = (
        load_file(result.folder / "model.safetensors"),
        load_file(source / "model.safetensors"),
    )
    norms = [name for name in before if name.endswith("layernorm.weight")]
    assert len(norms) == 4
    assert sum(not torch.equal(stored[name], before[name]) for name in norms) >= 2
    assert torch.equal(stored["model.norm.weight"], before["model.norm.weight"])
    model, windows = opened(source), tokens()
    with torch.no_grad():
        expected = load(result.folder)(windows[:1]).logits[0]
        found = next(from_packed(model, result.folder).windows(windows[:1]))(0, 24)
    assert torch.allclose(found.float(), expected.float(), atol=2e-3)


def refine(source: Path, folder: Path, ranks: Ranks = SINGLE, method: str = "rtn") -> RefinedModel:
    """The blocks with folded scales, at 3 bits, into an empty folder or one with blocks."""
    asked = config(refinement={"method": method, "transforms": [{"name": "awq"}]})
    model = opened(source)
    calibration = calibration_tokens(asked.calibration, source, seed=0)
    refine_model(
        model,
        RefineInputs(calibration, BitWidthMap.uniform(model.plan.shapes, 3), {}),
        asked.method,
        folder,
        seed=0,
        on_unit=lambda *_: None,
        transforms=asked.transforms,
        group=ranks,
    )
    return RefinedModel(folder, model.plan)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_run_that_goes_on_behind_a_saved_block_gives_the_same_bytes(
    tmp_path: Path, method: str
) -> None:
    """The source that runs beside `gptq` does not depend on what was folded either."""
    source = tinier_llama(tmp_path / "source", num_hidden_layers=4)
    whole, resumed = tmp_path / "1", tmp_path / "2"
    for folder in (whole, resumed):
        folder.mkdir()
        if folder == resumed:
            for file in whole.glob("block-00000.*"):
                shutil.copy(file, folder)
        refine(source, folder, method=method)
    found = [{p.name: p.read_bytes() for p in at.glob("block-*")} for at in (whole, resumed)]
    assert len(found[0]) == 8
    assert found[0] == found[1]


def refine_part(group: Ranks, source: str, folder: str) -> None:
    refine(Path(source), Path(folder), group)


def test_two_ranks_fold_the_scales_of_one(tmp_path: Path) -> None:
    """Each sees half of the windows; scales are found from all. The first rank stores."""
    source, together = uneven_llama(tmp_path / "source"), tmp_path / "together"
    for folder in (tmp_path / "alone", together):
        folder.mkdir()
    expected = refine(source, tmp_path / "alone")
    on_ranks(2, refine_part, source, together)
    found = RefinedModel(together, expected.plan)
    assert found.changed.keys() == expected.changed.keys()
    assert len(found.changed) >= 2
    for name, factors in expected.changed.items():
        torch.testing.assert_close(found.changed[name], factors, rtol=1e-4, atol=0)
    for shape in expected.plan.shapes:
        pair = [one.linear(shape.name).dequantize() for one in (found, expected)]
        assert (pair[0] - pair[1]).norm() < 0.02 * pair[1].norm()


def test_a_method_that_looks_at_no_inputs_or_takes_no_transforms_refuses_it() -> None:
    for method in ("hqq", "omniquant"):
        with pytest.raises(SpecError, match=re.escape(f"method '{method}'")):
            config(refinement={"method": method, "transforms": [{"name": "awq"}]})
