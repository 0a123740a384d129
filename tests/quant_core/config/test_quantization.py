"""The configuration refuses what breaks a rule, and names it."""

from pathlib import Path
from typing import Any

import pytest

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.methods import GPTQ, RTN, MethodConfig, OmniQuant, TrellisGPTQ
from bitmill.config.quantization import Evaluation, QuantizationConfig, Refinement, parse_config
from bitmill.errors import SpecError


def asked(**changes):
    return {"budget": {"bits": 3}} | changes


def test_defaults_round_trip_through_json():
    first = parse_config(asked())
    assert QuantizationConfig.model_validate_json(first.model_dump_json()) == first
    assert (first.budget.kind, first.budget.value) == ("bits", 3.0)


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"bogus": 1}, "bogus", "Extra inputs"),
        ({"label": "mine"}, "label", "Extra inputs"),
        ({"budget": {}}, "budget", "got none"),
        ({"budget": {"bits": 3, "size": 5}}, "budget", "bits and size"),
        ({"budget": {"bits": -1}}, "budget.bits", "greater than 0"),
        ({"budget": {"bits": float("nan")}}, "budget.bits", "finite"),
        ({"allocation": {"widths": [3, 7]}}, "allocation.widths", "[3, 7]"),
        ({"allocation": {"widths": []}}, "allocation.widths", "non-empty"),
        ({"allocation": {"method": "map"}}, "allocation", "missing"),
        ({"allocation": {"min_bits": 5, "max_bits": 3}}, "allocation", "5"),
        ({"allocation": {"widths": [2, 3], "min_bits": 4}}, "allocation", "no width"),
        ({"allocation": {"widths": [0]}}, "allocation", "drop every group"),
        ({"allocation": {"widths": [0, 2], "max_bits": 1}}, "allocation", "drop every group"),
        (
            {"allocation": {"widths": [0, 2], "method": "uniform"}},
            "allocation",
            "[0, 2] with method 'uniform': width 0 drops groups",
        ),
        ({"allocation": {"widths": [0, 1, 2, 3], "method": "sba"}}, "allocation", "'sba'"),
        (
            {"allocation": {"widths": [0, 2]}, "refinement": {"method": "hqq"}},
            "allocation.widths",
            "width 0, which drops groups, with refinement 'hqq'",
        ),
        (
            {
                "allocation": {"method": "map", "map": {"linears": {"a": "20"}}},
                "refinement": {"method": "exllama"},
            },
            "allocation.map",
            "with refinement 'exllama'",
        ),
        ({"allocation": {"widths": [2, 3], "edge_min_bits": 4}}, "allocation", "edge_min_bits 4"),
        (
            {
                "allocation": {"embeddings": "quantize"},
                "evaluation": {"baselines": ["embeddings"]},
            },
            "evaluation.baselines",
            "packs already",
        ),
        ({"calibration": {"sequences": 0}}, "calibration.sequences", "1"),
        ({"calibration": {"sequences": 4, "profile_sequences": 5}}, "calibration", "at most as"),
    ],
)
def test_refusals_name_the_key_and_the_value(changes, param, words):
    with pytest.raises(SpecError) as error:
        parse_config(asked(**changes))
    assert error.value.param == param
    assert words in error.value.message


def test_map_belongs_to_method_map_only():
    given = {"linears": {"a": "23"}}
    allowed = parse_config(asked(allocation={"method": "map", "map": given}))
    assert allowed.allocation.map == BitWidthMap(linears={"a": (2, 3)})
    with pytest.raises(SpecError, match="with no other"):
        parse_config(asked(allocation={"method": "sba", "map": given}))


def test_legal_widths_respect_the_limits():
    allocation = parse_config(asked(allocation={"widths": [8, 2, 4, 4], "min_bits": 3})).allocation
    assert allocation.widths == (2, 4, 8)
    assert allocation.legal_widths == (4, 8)
    dropping = parse_config(asked(allocation={"widths": [2, 0]})).allocation
    assert dropping.legal_widths == (0, 2)
    kept = parse_config(asked(allocation={"widths": [2, 0], "min_bits": 1, "method": "uniform"}))
    assert kept.allocation.legal_widths == (2,)


def test_json_and_typed_settings_of_a_method_are_one() -> None:
    methods = [
        RTN(clip_search=False),
        GPTQ(scale_refit=False),
        OmniQuant(mode="scales", epochs=3, resume_parameters=Path("earlier"), clip_search=False),
    ]
    for method in methods:
        asked = Refinement.of(method)
        assert asked.typed == method
        again = parse_config({"budget": {"bits": 3}, "refinement": asked.model_dump(mode="json")})
        assert again.method == method


@pytest.mark.parametrize(
    ("refinement", "problem"),
    [
        ({"method": "quip"}, "refinement method 'quip' is unknown: known are rtn, gptq, hqq"),
        ({"settings": {"steps": 3}}, "settings.steps: Extra inputs are not permitted"),
        ({"settings": {"asymmetric": True}}, "settings.asymmetric: give it outside"),
        ({"settings": {"epochs": 3}}, "settings.epochs: give it outside"),
    ],
)
def test_methods_and_settings_that_there_are_not_are_refused(
    refinement: dict[str, object], problem: str
) -> None:
    with pytest.raises(SpecError, match=problem):
        parse_config({"budget": {"bits": 3}, "refinement": refinement})


@pytest.mark.parametrize(
    ("method", "needs", "learns"),
    [
        (RTN(), {"hessian"}, False),
        (GPTQ(), {"hessian", "shift"}, False),
        (GPTQ(asymmetric=False), {"hessian"}, False),
        (OmniQuant(), {"hessian"}, True),
        (OmniQuant(resume_parameters=Path("earlier")), {"hessian"}, False),
    ],
)
def test_a_method_says_what_it_needs(method: MethodConfig, needs: set[str], learns: bool) -> None:
    assert method.needs == needs
    assert (method.learning is not None) == learns
    for setting, value, lighter in method.lighter():
        assert getattr(lighter, setting) == value != getattr(method, setting)


def test_a_code_brings_its_widths_and_format():
    plain = parse_config({"budget": {"bits": 3}})
    assert (plain.code_name, plain.format, plain.method.kind) == ("affine", "bitmill-1", "affine")
    assert plain.allocation.widths == (2, 3, 4, 5, 6, 8)
    asked = parse_config({"code": "trellis", "budget": {"bits": 3}})
    assert (asked.code_name, asked.format, asked.method.kind) == ("trellis", "bitmill-2", "trellis")
    assert asked.allocation.widths == (1, 2, 3, 4, 5, 6, 7, 8)
    assert [one.name for one in asked.transforms] == ["rotation"]
    assert parse_config(asked.model_dump(mode="json")) == asked
    some = parse_config(
        {"code": "trellis", "budget": {"bits": 3}, "allocation": {"widths": [2, 7]}}
    )
    assert some.allocation.widths == (2, 7)
    several = parse_config(
        {"code": "trellis", "effort": "best", "budget": {"bits": 3}, "devices": 3}
    )
    assert (several.devices, several.method) == (3, TrellisGPTQ())
    assert several.weighs_in_profile


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code": "affine", "allocation": {"widths": [3, 7]}}, "code 'affine' has no width 7"),
        ({"code": "trellis", "allocation": {"widths": [0, 3]}}, "code 'trellis' has no width 0"),
        ({"code": "trellis", "refinement": {"method": "exllama"}}, "finds no codes of 'trellis'"),
        (
            {"code": "trellis", "devices": 2, "refinement": {"method": "omniquant"}},
            "devices 2 with refinement 'omniquant', which works on 1",
        ),
        (
            {"code": "trellis", "allocation": {"embeddings": "quantize", "widths": [7]}},
            "widths.*embeddings and heads are in affine codes.*or give 'keep'",
        ),
        (
            {
                "code": "trellis",
                "allocation": {
                    "method": "map",
                    "map": {"linears": {"some": "34"}},
                    "embeddings": "quantize",
                    "widths": [7],
                },
            },
            "widths.*embeddings and heads are in affine codes",
        ),
        (
            {"code": "trellis", "allocation": {"check": "corrected"}},
            "check 'corrected' with code 'trellis'.*leave it out",
        ),
        ({"code": "vector"}, "code"),
    ],
)
def test_what_a_code_cannot_do_is_refused(changes, message):
    with pytest.raises(SpecError, match=message):
        parse_config({"budget": {"bits": 3}} | changes)


def test_the_schema_names_the_baselines_that_are_taken() -> None:
    named = Evaluation.model_json_schema()["properties"]["baselines"]["items"]["enum"]
    assert {"uniform", "uniform-2", "embeddings", "activations-8-static", "cache-2"} < {*named}
    assert Evaluation(baselines=tuple(named)).baselines == tuple(named)
    with pytest.raises(ValueError, match=r"'uniform-5' is unknown: known are uniform, uniform-2"):
        Evaluation(baselines=("uniform-5",))


def test_a_refusal_is_told_in_its_own_words() -> None:
    for asked in ({"evaluation": {"baselines": ["x"]}}, {"refinement": {"transforms": [{}]}}):
        with pytest.raises(SpecError) as refusal:
            parse_config({"budget": {"bits": 3}} | asked)
        assert "Value error" not in refusal.value.message


@pytest.mark.parametrize(
    "asked",
    [
        {"refinement": {"method": "omniquant"}},
        {"effort": "balanced"},
        {"effort": "best", "code": "trellis"},
    ],
)
def test_learning_without_held_out_windows_is_refused(asked: dict[str, Any]) -> None:
    spec = {"budget": {"bits": 3}, "calibration": {"held_out": 0}, **asked}
    with pytest.raises(SpecError, match="held-out windows choose") as caught:
        parse_config(spec)
    assert (caught.value.code, caught.value.param) == ("no_held_out", "calibration.held_out")
    parse_config(spec | {"calibration": {"held_out": 1}})


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"refinement": {"method": "normtweaking"}},
        {"effort": "balanced", "code": "trellis"},
        {"refinement": {"method": "omniquant", "omniquant": {"resume_parameters": "/kept"}}},
    ],
)
def test_what_no_held_out_window_chooses_takes_none(asked: dict[str, Any]) -> None:
    allocation = {"method": "uniform"}
    parse_config(
        {"budget": {"bits": 3}, "calibration": {"held_out": 0}, "allocation": allocation} | asked
    )
