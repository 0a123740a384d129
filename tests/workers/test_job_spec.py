"""The job specification: its rules, what is stored of it, and the configuration it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import FileText, QuantizationConfig
from bitmill.errors import SpecError
from bitmill_workers.job_spec import InlineMap, JobSpec, parse_spec

MODEL = {"source": "path", "path": "model"}
MAP = BitWidthMap(linears={"a": (2, 3)})
STORED = Path(__file__).resolve().parents[1] / "golden" / "spec-v1.json"


def spec(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "budget": {"bits": 3}} | changes


def with_map(**reference: str) -> JobSpec:
    return parse_spec(spec(allocation={"method": "map", "map": reference}))


def with_parameters(**reference: str) -> JobSpec:
    learned = {"method": "omniquant", "omniquant": {"resume_parameters": reference}}
    return parse_spec(spec(refinement=learned))


def test_defaults_round_trip_through_json() -> None:
    first = parse_spec(spec())
    assert JobSpec.model_validate_json(first.model_dump_json()) == first
    assert (first.budget.kind, first.budget.value) == ("bits", 3.0)


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"bogus": 1}, "bogus", "Extra inputs"),
        ({"schema_version": 2}, "schema_version", "1"),
        ({"budget": {}}, "budget", "got none"),
        ({"allocation": {"method": "map"}}, "allocation", "missing"),
        ({"allocation": {"method": "map", "map": {"linears": {}}}}, "allocation.map", "source"),
        ({"devices": 2, "refinement": {"method": "omniquant"}}, "spec", "works on 1"),
        (
            {"refinement": {"omniquant": {"resume_parameters": {"source": "path", "path": "p"}}}},
            "refinement",
            "give method 'omniquant'",
        ),
        ({"model": {"source": "hub", "repo_id": "a/b/c"}}, "model.hub.repo_id", "pattern"),
        ({"model": MODEL | {"file": "../x.gguf"}}, "model", "plain name"),
        ({"model": MODEL | {"file": "x.bin"}}, "model", "gguf"),
    ],
)
def test_refusals_name_the_key_and_the_value(
    changes: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(SpecError) as error:
        parse_spec(spec(**changes))
    assert error.value.param == param
    assert words in error.value.message


def test_a_stored_specification_keeps_its_meaning() -> None:
    stored = json.loads(STORED.read_text())
    found = parse_spec(stored)
    assert (found.budget.kind, found.budget.value) == ("bits", 3.25)
    assert isinstance(found.allocation.map, InlineMap)
    assert found.allocation.map.map.linears == {"model.layers.0.mlp.up_proj": (3, 3, 4, 3, 2)}
    assert found.calibration.text == FileText(path="text.jsonl", field="content")
    again = found.model_dump(mode="json")
    assert _part_of(stored, again)
    assert parse_spec(again) == found


def _part_of(part: Any, whole: Any) -> bool:
    if isinstance(part, dict):
        return all(key in whole and _part_of(value, whole[key]) for key, value in part.items())
    return bool(part == whole)


def test_the_configuration_holds_every_setting_but_the_service_s_own() -> None:
    found = parse_spec(json.loads(STORED.read_text()))
    config, own = found.config(), {"schema_version", "model", "label", "deadline_s", "exports"}
    assert QuantizationConfig.model_fields.keys() == JobSpec.model_fields.keys() - own
    expected = found.model_dump(exclude=own)
    expected["allocation"]["map"] = expected["allocation"]["map"]["map"]
    assert config.model_dump() == expected
    assert QuantizationConfig.model_validate_json(config.model_dump_json()) == config


def test_a_configuration_takes_what_the_references_stand_for() -> None:
    text = {"text": {"source": "file", "path": "root/text.txt", "field": "content"}}
    local = parse_spec(spec(calibration=text)).config(text=Path("/here/text.txt"))
    assert local.calibration.text == FileText(path="/here/text.txt", field="content")
    bundled = parse_spec(spec()).config(text=Path("/here/text.txt"), bit_widths=MAP)
    assert bundled == parse_spec(spec()).config()
    for reference in ({"source": "job", "job_id": "j"}, {"source": "upload", "map_id": "m"}):
        assert with_map(**reference).config(bit_widths=MAP).allocation.map == MAP
    folder = Path("/here/learned")
    learned = with_parameters(source="job", job_id="j").config(parameters=folder)
    assert learned.refinement.omniquant.resume_parameters == folder
    published = with_parameters(source="path", path="out")
    assert published.config().refinement.omniquant.resume_parameters == Path("out")
    assert published.config(parameters=folder).refinement.omniquant.resume_parameters == folder


@pytest.mark.parametrize(
    ("named", "param"),
    [
        (with_map(source="job", job_id="j"), "allocation.map"),
        (with_map(source="upload", map_id="m"), "allocation.map"),
        (
            with_parameters(source="job", job_id="j"),
            "refinement.omniquant.resume_parameters",
        ),
    ],
)
def test_a_reference_that_nothing_is_given_for_is_named(named: JobSpec, param: str) -> None:
    with pytest.raises(SpecError, match="need") as refused:
        named.config()
    assert refused.value.param == param
