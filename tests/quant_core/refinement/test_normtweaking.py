"""Method "normtweaking": norms learned behind quantized linears."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bitmill.calibration.windows import calibration_tokens
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import parse_config
from bitmill.errors import SpecError
from bitmill.io.atomic import read_json
from bitmill.models.streamed import StreamedModel
from bitmill.plan.model_plan import make_plan
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.refinement.store import report_path
from bitmill.results import BlockQuality
from streaming import Watched
from tiny import tiny_llama

TEXT = {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")}


def config(settings: dict[str, Any] | None = None, **changes: Any) -> Any:
    base: dict[str, Any] = {
        "budget": {"code_bits": 2},
        "allocation": {"method": "uniform", "order": "natural"},
        "refinement": {"method": "normtweaking", "settings": settings or {}},
        "calibration": {"text": TEXT, "sequences": 16, "length": 64, "held_out": 4},
    }
    return parse_config(base | changes)


def refined(source: Path, folder: Path, **settings: Any) -> RefinedModel:
    plan = make_plan(source, config(settings))
    model = StreamedModel(source, plan, device=torch.device("cpu"), dtype=torch.float32)
    return refined_model(model, source, folder, **settings)


def refined_model(
    model: StreamedModel, source: Path, folder: Path, **settings: Any
) -> RefinedModel:
    asked = config(settings)
    folder.mkdir()
    inputs = RefineInputs(
        calibration_tokens(asked.calibration, source, seed=0),
        BitWidthMap.uniform(model.plan.shapes, 2),
        {},
    )
    refine_model(model, inputs, asked.method, folder, seed=0, on_unit=lambda *_: None)
    return RefinedModel(folder, model.plan)


def test_gradients_of_norms_come_from_deterministic_kernels(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    model = Watched(source)
    refined_model(model, source, tmp_path / "learned")
    assert model.forward == model.backward == [True] * len(model.forward)
    assert len(model.forward) >= model.block_count


def test_norms_are_learned_where_that_helps_and_linears_stay(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    learned = refined(source, tmp_path / "learned")
    plain = refined(source, tmp_path / "plain", passes=0)
    assert plain.changed == {}
    first = learned.plan.block_linears(0)
    for linear in first:
        weights = [each.linear(linear.name).dequantize() for each in (learned, plain)]
        assert torch.equal(*weights)
    for index in range(2):
        report = read_json(report_path(learned.folder, index))["learning"]
        block = BlockQuality.model_validate(report)
        moved = {name for name in learned.changed if f".layers.{index}." in name}
        norms = {
            f"model.layers.{index}.{name}.weight"
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        assert moved == (norms if block.kept == "learned" else set())
        assert (block.loss_after < block.loss_before) == (block.kept == "learned")
        assert block.loss_after == min(loss for _, loss in block.curve)
        assert block.steps == 3 * 4
        if index == 0:
            assert block.kept == "learned"
            untuned = read_json(report_path(plain.folder, 0))["learning"]
            assert block.loss_before == pytest.approx(untuned["loss_before"])


def test_steps_that_only_harm_are_taken_back(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source")
    found = refined(source, tmp_path / "learned", learning_rate=1.0, passes=1)
    assert found.changed == {}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"code": "trellis"}, "method 'normtweaking' finds no codes of 'trellis'"),
        ({"devices": 2}, "'normtweaking', which works on 1"),
    ],
)
def test_what_it_has_not_is_refused_by_name(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError, match=re.escape(problem)):
        config(**changes)
