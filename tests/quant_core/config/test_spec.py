"""The job specification refuses what breaks a rule, and names it."""

import pytest

from bitmill.config.spec import JobSpec, parse_spec
from bitmill.errors import SpecError

MODEL = {"source": "path", "path": "model"}


def spec(**changes):
    return {"model": MODEL, "budget": {"bits": 3}} | changes


def test_defaults_round_trip_through_json():
    first = parse_spec(spec())
    assert JobSpec.model_validate_json(first.model_dump_json()) == first
    assert (first.budget.kind, first.budget.value) == ("bits", 3.0)


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"bogus": 1}, "bogus", "Extra inputs"),
        ({"budget": {}}, "budget", "got none"),
        ({"budget": {"bits": 3, "size": 5}}, "budget", "bits and size"),
        ({"budget": {"bits": -1}}, "budget.bits", "greater than 0"),
        ({"budget": {"bits": float("nan")}}, "budget.bits", "finite"),
        ({"schema_version": 2}, "schema_version", "1"),
        ({"allocation": {"widths": [3, 7]}}, "allocation.widths", "[3, 7]"),
        ({"allocation": {"widths": []}}, "allocation.widths", "non-empty"),
        ({"allocation": {"method": "map"}}, "allocation", "missing"),
        ({"allocation": {"min_bits": 5, "max_bits": 3}}, "allocation", "5"),
        ({"allocation": {"widths": [2, 3], "min_bits": 4}}, "allocation", "no width"),
        ({"allocation": {"widths": [2, 3], "edge_min_bits": 4}}, "allocation", "edge_min_bits 4"),
        ({"calibration": {"sequences": 0}}, "calibration.sequences", "1"),
        ({"calibration": {"sequences": 4, "profile_sequences": 5}}, "calibration", "at most as"),
        ({"model": {"source": "hub", "repo_id": "a/b/c"}}, "model.hub.repo_id", "pattern"),
        ({"model": MODEL | {"file": "../x.gguf"}}, "model", "plain name"),
        ({"model": MODEL | {"file": "x.bin"}}, "model", "gguf"),
    ],
)
def test_refusals_name_the_key_and_the_value(changes, param, words):
    with pytest.raises(SpecError) as error:
        parse_spec(spec(**changes))
    assert error.value.param == param
    assert words in error.value.message


def test_map_belongs_to_method_map_only():
    given = {"source": "inline", "map": {"linears": {"a": "23"}}}
    allowed = parse_spec(spec(allocation={"method": "map", "map": given}))
    assert allowed.allocation.map.map.linears == {"a": (2, 3)}
    with pytest.raises(SpecError, match="with no other"):
        parse_spec(spec(allocation={"method": "sba", "map": given}))


def test_legal_widths_respect_the_limits():
    allocation = parse_spec(spec(allocation={"widths": [8, 2, 4, 4], "min_bits": 3})).allocation
    assert allocation.widths == (2, 4, 8)
    assert allocation.legal_widths == (4, 8)
