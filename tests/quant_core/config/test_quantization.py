"""The configuration refuses what breaks a rule, and names it."""

import pytest

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import QuantizationConfig, parse_config
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
        ({"allocation": {"widths": [2, 3], "edge_min_bits": 4}}, "allocation", "edge_min_bits 4"),
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
