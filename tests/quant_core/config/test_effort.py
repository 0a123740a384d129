"""One word for the settings of refinement that are left open, resolved where it is read."""

import pytest

from bitmill.config.effort import CODED, EFFORTS
from bitmill.config.methods import GPTQ, RTN, OmniQuant
from bitmill.config.quantization import QuantizationConfig, Refinement, parse_config
from bitmill.errors import SpecError
from bitmill_workers.job_spec import JobSpec, parse_spec

MODEL = {"model": {"source": "path", "path": "m"}}


def method(**changes):
    return parse_config({"budget": {"bits": 3}} | changes).method


@pytest.mark.parametrize("effort", EFFORTS)
def test_open_fields_are_filled(effort):
    settings = EFFORTS[effort]
    found = method(effort=effort)
    assert found.name == settings["method"]
    for name, value in settings.get("omniquant", {}).items():
        assert getattr(found, name) == value
    assert method(effort=effort, refinement={}) == found


def test_given_fields_win():
    found = method(effort="best", refinement={"omniquant": {"epochs": 1}, "clip_search": False})
    assert isinstance(found, OmniQuant)
    assert (found.epochs, found.clip_search) == (1, False)
    assert found.tune_scales_steps == EFFORTS["best"]["omniquant"]["tune_scales_steps"]


def test_another_method_keeps_its_own_defaults():
    assert method(effort="best", refinement={"method": "rtn"}) == RTN()
    assert method(effort="fast", refinement={"method": "omniquant"}) == OmniQuant()


def test_several_devices_take_what_works_on_them():
    assert method(effort="best", devices=2) == GPTQ()
    assert parse_config({"budget": {"bits": 3}, "effort": "balanced", "devices": 2}).devices == 2


@pytest.mark.parametrize("effort", EFFORTS)
def test_every_effort_may_drop_groups(effort):
    found = method(effort=effort, allocation={"widths": [0, 2, 3]})
    assert found == method(effort=effort)


@pytest.mark.parametrize("stored", [{"code": "trellis"}, {"format": "bitmill-2"}])
def test_another_code_takes_what_it_has(stored):
    config = parse_config({"budget": {"bits": 3}, "effort": "best"} | stored)
    assert (config.method.kind, config.method.name) == ("trellis", "omniquant")
    assert config.method.tune_scales_steps == CODED["best"]["omniquant"]["tune_scales_steps"]
    fast = parse_config({"budget": {"bits": 3}, "effort": "fast"} | stored)
    assert (fast.method.kind, fast.method.name) == ("trellis", "gptq")


def test_parameters_are_not_resumed_in_another_code():
    learned = {"method": "omniquant", "omniquant": {"resume_parameters": "folder"}}
    with pytest.raises(SpecError) as error:
        parse_config({"budget": {"bits": 3}, "code": "trellis", "refinement": learned})
    assert error.value.param == "refinement.omniquant.resume_parameters"


def test_an_object_is_complete():
    made = QuantizationConfig(budget={"bits": 3}, effort="best", refinement=Refinement())
    assert made.method == GPTQ()


@pytest.mark.parametrize("parse", [parse_config, lambda data: parse_spec(MODEL | data)])
def test_what_is_stored_is_resolved(parse, monkeypatch):
    made = parse({"budget": {"bits": 3}, "effort": "best"})
    stored = made.model_dump(mode="json")
    assert stored["effort"] == "best"
    assert stored["refinement"]["omniquant"]["epochs"] == EFFORTS["best"]["omniquant"]["epochs"]
    monkeypatch.setitem(EFFORTS, "best", {"method": "rtn"})
    assert parse(stored) == made


def test_a_job_hands_on_what_it_stored():
    spec = parse_spec(MODEL | {"budget": {"bits": 3}, "effort": "balanced"})
    assert isinstance(spec, JobSpec)
    assert spec.config().method == method(effort="balanced")
    assert spec.config().effort == "balanced"


@pytest.mark.parametrize("wrong", ["worst", "", None, 3, ["best"], {}])
def test_an_unknown_effort_is_refused_by_name(wrong):
    with pytest.raises(SpecError) as error:
        parse_config({"budget": {"bits": 3}, "effort": wrong})
    assert error.value.param == "effort"
