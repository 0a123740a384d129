"""Maps measured before one is taken: the measure itself, the choice, and what reports say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bitmill.allocation.allocator import allocate
from bitmill.allocation.profile import SensitivityProfile
from bitmill.calibration.gradients import PassSettings
from bitmill.calibration.windows import CalibrationSet
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.methods import RTN
from bitmill.config.quantization import QuantizationConfig, parse_config
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.source import Model
from bitmill.pipeline.stage import Environment, Run
from bitmill.pipeline.stages import allocate as stage
from bitmill.pipeline.stages import refine
from bitmill.plan.model_plan import make_plan
from bitmill.results import CheckedMap
from bitmill.runtime.ranks import SINGLE
from bitmill.sensitivity.checked_maps import (
    LARGEST_FACTOR,
    Measured,
    corrected,
    measure_maps,
    parts_of,
)
from bitmill.sensitivity.fisher import SensitivitySettings, profile_knapsack
from bitmill.solvers.gptq.settings import GptqSettings
from solving import quantize_gptq
from streaming import token_windows
from tiny import tiny_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model", num_hidden_layers=1)


def config(bits: float = 3.6, **allocation: object) -> QuantizationConfig:
    return parse_config(
        {"budget": {"bits": bits}, "allocation": {"widths": [2, 3, 4, 6]} | allocation}
    )


@pytest.fixture(scope="module")
def model(folder: Path) -> StreamedModel:
    return StreamedModel(folder, make_plan(folder, config()), device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def calibration() -> CalibrationSet:
    return CalibrationSet(token_windows(20), token_windows(3, seed=1), "")


@pytest.fixture(scope="module")
def profile(model: StreamedModel, calibration: CalibrationSet) -> SensitivityProfile:
    settings = SensitivitySettings((0, 1, 2, 3, 4, 6), rows=32, gradients=PassSettings(batch=8))
    return profile_knapsack(model, calibration.tokens, model.plan, settings)


def order_of(profile: SensitivityProfile, name: str) -> torch.Tensor:
    return torch.from_numpy(profile.orders[profile.linear(name).order or ""]).long()


def test_the_measure_is_the_divergence_of_the_whole_model(
    folder: Path, model: StreamedModel, calibration: CalibrationSet, profile: SensitivityProfile
) -> None:
    """Against transformers: every linear by GPTQ on the float model's inputs."""
    chosen = allocate(model.plan, config(), profile)
    other = BitWidthMap.uniform(model.plan.shapes, 3, "activation")
    orders = {name: order_of(profile, name) for name in model.plan.by_name}
    parts = parts_of(model.plan)
    assert set(parts) == {"block 0", *(name.rpartition(".")[2] for name in orders)}
    measured = measure_maps(
        model,
        calibration,
        {"a": chosen, "b": other},
        orders,
        on_unit=lambda *_: None,
        parts=parts,
    )
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        whole.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: inputs.__setitem__(name, args[0].flatten(0, 1))
        )
        for name in model.plan.by_name
    ]
    with torch.no_grad():
        whole(calibration.tokens)
        for handle in handles:
            handle.remove()
        source = whole(calibration.held_out).logits[:, :-1].log_softmax(-1)
        originals = {n: whole.get_submodule(n).weight.detach().clone() for n in inputs}
        whole_map = [("a", chosen, set(originals)), ("b", other, set(originals))]
        some = [(part, chosen, parts[part]) for part in ("down_proj", "k_proj", "block 0")]
        for tag, bit_widths, names in whole_map + some:
            for name, x in inputs.items():
                if name not in names:
                    whole.get_submodule(name).weight.copy_(originals[name])
                    continue
                weight, _ = quantize_gptq(
                    originals[name],
                    x.T @ x / len(x),
                    bit_widths.linears[name],
                    order=orders[name],
                    settings=GptqSettings(compensated=None, rounds=0),
                )
                whole.get_submodule(name).weight.copy_(weight.dequantize())
            changed = whole(calibration.held_out).logits[:, :-1].log_softmax(-1)
            kl = (source.exp() * (source - changed)).sum(-1).mean(1)
            if tag in measured.maps:
                np.testing.assert_allclose(measured.maps[tag].kl.numpy(), kl.numpy(), rtol=0.05)
            else:
                assert measured.parts[tag] == pytest.approx(float(kl.mean()), rel=0.05)


def run(warnings: list[str]) -> Run:
    return Run(CPU, SINGLE, lambda *_: None, warnings.append, dict)


def inputs(
    folder: Path,
    model: StreamedModel,
    calibration: CalibrationSet,
    profile: SensitivityProfile,
    asked: QuantizationConfig,
) -> stage.Inputs:
    environment = Environment.here(CPU, SINGLE)
    check = stage.Check(Model(folder, "", {}), calibration, environment)
    return stage.Inputs(model.plan, asked.code, asked.allocation, asked.budget, profile, check)


def turned(profile: SensitivityProfile) -> SensitivityProfile:
    """What it says costs most costs least: a knapsack's map is a bad one."""
    linears = tuple(
        replace(li, costs=np.maximum(0, 1e-3 / li.costs[:, :1] * (8 - np.array(profile.widths))))
        for li in profile.linears
    )
    return replace(profile, linears=linears)


def test_a_map_that_loses_more_than_the_uniform_one_is_not_taken(
    folder: Path,
    model: StreamedModel,
    calibration: CalibrationSet,
    profile: SensitivityProfile,
    tmp_path: Path,
) -> None:
    for number, (given, uniform) in enumerate(((profile, False), (turned(profile), True))):
        warnings: list[str] = []
        place = tmp_path / str(number)
        place.mkdir()
        asked = inputs(folder, model, calibration, given, config(3.45, check="corrected"))
        stage.work(asked, run(warnings), place)
        made = stage.load(place)
        found = {check.method: check for check in made.checks}
        assert set(found) == {"knapsack", "uniform", "knapsack, corrected"}
        (taken,) = (name for name, check in found.items() if check.taken)
        assert found[taken].kl == min(check.kl for check in found.values())
        assert found[taken].predicted_loss == given.predicted_loss(made.bit_widths.linears)
        widths = {width for linear in made.bit_widths.linears.values() for width in linear}
        assert (widths == {3}) == (taken == "uniform") == uniform
        assert any("uniform map lost less" in warning for warning in warnings) == uniform


@pytest.mark.parametrize(
    ("widths", "cheap", "left"),
    [
        ([1, 2, 3, 4], (1,), "width 1"),
        ([0, 2, 3, 4], (0,), "width 0"),
        ([0, 1, 2, 3, 4], (0, 1), "widths 0 and 1"),
    ],
)
def test_widths_are_left_out_where_that_loses_less(
    widths: list[int],
    cheap: tuple[int, ...],
    left: str,
    folder: Path,
    model: StreamedModel,
    calibration: CalibrationSet,
    profile: SensitivityProfile,
    tmp_path: Path,
) -> None:
    free = np.isin(profile.widths, cheap)
    linears = tuple(replace(li, costs=np.where(free, 0.0, li.costs)) for li in profile.linears)
    believing = replace(profile, linears=linears)
    asked = inputs(folder, model, calibration, believing, config(2.6, widths=widths, check="maps"))
    stage.work(asked, run([]), tmp_path)
    made = stage.load(tmp_path)
    (taken,) = [check.method for check in made.checks if check.taken]
    assert taken == f"knapsack without {left}"
    assert not any(set(cheap) & set(groups) for groups in made.bit_widths.linears.values())


@pytest.mark.parametrize("better", ["knapsack", "knapsack without width 0"])
def test_a_map_with_dropped_groups_is_taken_only_where_it_loses_less_refined(
    folder: Path,
    model: StreamedModel,
    calibration: CalibrationSet,
    profile: SensitivityProfile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    better: str,
) -> None:
    given = inputs(folder, model, calibration, profile, config(1.5, widths=[0, 1, 2, 3]))
    assert given.check is not None
    refining = refine.Inputs(
        model=given.check.model,
        plan=model.plan,
        calibration=calibration,
        bit_widths=BitWidthMap.uniform(model.plan.shapes, 2, "activation"),
        orders={},
        order_of={},
        method=RTN(),
        transforms=(),
        seed=0,
        watched={},
        environment=given.check.environment,
    )
    check = stage.DroppingCheck(
        given.check.model, calibration, given.check.environment, refining=refining
    )
    asked: list[BitWidthMap] = []

    def loss(refining: refine.Inputs, found: BitWidthMap, _: Run, scratch: Path) -> object:
        asked.append(found)
        dropping = any(0 in widths for widths in found.linears.values())
        return (1.0 if dropping == (better == "knapsack") else 2.0), 0.25

    monkeypatch.setattr(stage, "refined_loss", loss)
    stage.work(replace(given, check=check), run([]), tmp_path)
    made = stage.load(tmp_path)
    hasty = {one.method: one.kl for one in made.checks if not one.method.endswith("refined")}
    assert hasty["knapsack"] < hasty["knapsack without width 0"]
    assert [any(0 in widths for widths in one.linears.values()) for one in asked] == [False, True]
    (taken,) = [one for one in made.checks if one.taken]
    assert (taken.method, taken.kl, taken.kl_se) == (f"{better}, refined", 1.0, 0.25)
    assert made.bit_widths == asked[better == "knapsack"]


def test_nothing_is_measured_where_it_is_not_asked_for(
    model: StreamedModel, profile: SensitivityProfile, tmp_path: Path
) -> None:
    asked = config(check="off")
    given = stage.Inputs(model.plan, asked.code, asked.allocation, asked.budget, profile, None)
    stage.work(given, run([]), tmp_path)
    made = stage.load(tmp_path)
    assert made.checks == ()
    assert made.bit_widths == allocate(model.plan, asked, profile)
    assert made.corrected(profile) is profile


def test_costs_are_corrected_by_block_and_kind(
    model: StreamedModel, profile: SensitivityProfile
) -> None:
    """Every kind k costs c_k times what was predicted, the map as a whole twice as much."""
    bit_widths = BitWidthMap.uniform(model.plan.shapes, 3, "activation")
    parts = parts_of(model.plan)
    kinds = [part for part in parts if not part.startswith("block")]
    times = {kind: 2.0 + i for i, kind in enumerate(kinds)} | {kinds[0]: 1e-9, "block 0": 2.0}

    def predicted(names: frozenset[str]) -> float:
        return profile.predicted_loss({name: bit_widths.linears[name] for name in names})

    alone = Measured({}, {part: times[part] * predicted(names) for part, names in parts.items()})
    every = 2 * profile.predicted_loss(bit_widths.linears)
    found = corrected(profile, model.plan, bit_widths, every, alone)
    for linear in profile.linears:
        expected = max(1 / LARGEST_FACTOR, times[linear.name.rpartition(".")[2]])
        np.testing.assert_allclose(found.linear(linear.name).costs, linear.costs * expected)
    unmeasured = corrected(profile, model.plan, bit_widths, every, Measured({}, {}))
    np.testing.assert_allclose(unmeasured.linears[0].costs, profile.linears[0].costs * 2)


@pytest.mark.parametrize(("kl", "factor"), [(0.24, 1.0), (0.27, 1.62), (0.08, 0.48), (0.12, 1.0)])
def test_predictions_are_corrected_where_they_are_far_off(
    model: StreamedModel, profile: SensitivityProfile, kl: float, factor: float
) -> None:
    check = CheckedMap(
        method="knapsack", bits=3.0, predicted_loss=0.1, kl=kl, kl_se=0.0, taken=True
    )
    bit_widths = BitWidthMap.uniform(model.plan.shapes, 3, "activation")
    made = stage.Allocated(bit_widths, (check,))
    told = made.corrected(profile)
    assert told is not None
    assert told.predicted_loss(bit_widths.linears) == pytest.approx(
        factor * profile.predicted_loss(bit_widths.linears)
    )
    assert told.key == profile.key
