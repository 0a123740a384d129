"""One word for what is left open of refinement and calibration, resolved where it is read."""

import pytest

from bitmill.config.effort import CODED, EFFORTS, HELD_OUT, LONGEST, WINDOWS, with_effort
from bitmill.config.methods import GPTQ, RTN, OmniQuant
from bitmill.config.quantization import (
    BundledText,
    Calibration,
    QuantizationConfig,
    Refinement,
    parse_config,
)
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


def windows(calibration=None, **changes):
    """Calibration windows of a job in trellis codes by effort best, with these changes."""
    given = {} if calibration is None else {"calibration": calibration}
    best = {"budget": {"bits": 3}, "code": "trellis", "effort": "best"}
    return parse_config(best | given | changes).calibration.sequences


DEFAULT = Calibration().sequences
BUNDLED = {"source": "bundled", "name": "wiki_calibration"}


@pytest.mark.parametrize(
    "calibration",
    [
        None,
        {},
        {"text": BUNDLED},
        {"text": {"source": "bundled"}},
        {"text": BundledText()},
        {"length": LONGEST},
        {"length": 512, "framing": "none"},
        {"held_out": 48},
        {"held_out_text": "mixture_calibration", "profile_sequences": WINDOWS},
    ],
    ids=str,
)
def test_the_best_trellis_codes_take_more_windows(calibration):
    assert windows(calibration) == WINDOWS > DEFAULT


@pytest.mark.parametrize(
    "calibration",
    [
        {"sequences": DEFAULT},
        {"text": BUNDLED | {"name": "mixture_calibration"}},
        {"text": BUNDLED | {"name": "blend_calibration"}},
        {"text": {"source": "file", "path": "text.txt"}},
        {"text": {"source": "dataset", "name": "org/set"}},
        {"length": LONGEST + 1},
        {"held_out": 49},
        {"framing": "chat"},
        Calibration(length=512),
    ],
    ids=str,
)
def test_a_calibration_that_may_lack_them_or_says_a_number_keeps_its_own(calibration):
    assert windows(calibration) == DEFAULT
    if isinstance(calibration, dict) and "sequences" not in calibration:
        assert windows(calibration | {"sequences": 9}) == 9


@pytest.mark.parametrize(
    "changes",
    [
        {"effort": "balanced"},
        {"effort": "fast"},
        {"code": "affine"},
        {"code": "auto"},
        {"refinement": {"method": "gptq"}},
        {"refinement": Refinement()},
    ],
    ids=str,
)
def test_other_jobs_keep_the_usual_windows(changes):
    assert windows(**changes) == DEFAULT


def test_several_devices_take_the_usual_windows():
    asked = {"budget": {"bits": 3}, "code": "trellis", "effort": "best"}
    assert with_effort(asked)["calibration"] == {"sequences": WINDOWS}
    assert "calibration" not in with_effort(asked | {"devices": 2})


@pytest.mark.parametrize(
    "changes",
    [
        {"code": "auto", "format": "bitmill-2"},
        {"refinement": {"method": "omniquant"}},
        {"refinement": {"omniquant": {"tune_scales_steps": 7}}},
        {"budget": {"max_loss_increase": 0.1}},
    ],
    ids=str,
)
def test_windows_are_many_whichever_way_the_best_trellis_codes_are_asked_for(changes):
    assert windows(**changes) == WINDOWS


def test_what_it_takes_for_granted_of_calibration_is_so():
    usual = Calibration()
    assert (usual.length, usual.held_out) == (LONGEST, HELD_OUT)
    assert usual.text == BundledText.model_validate(BUNDLED)


@pytest.mark.parametrize("wrong", [None, [], 3, "text", {"text": None}, {"length": "x"}])
def test_a_calibration_that_is_none_is_left_to_the_parser(wrong):
    with pytest.raises(SpecError) as error:
        parse_config(
            {"budget": {"bits": 3}, "code": "trellis", "effort": "best"} | {"calibration": wrong}
        )
    assert error.value.param.startswith("calibration")


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


@pytest.mark.parametrize("parse", [parse_config, lambda data: parse_spec(MODEL | data)])
def test_stored_windows_are_resolved(parse, monkeypatch):
    stored = parse({"budget": {"bits": 3}, "code": "trellis", "effort": "best"}).model_dump(
        mode="json"
    )
    assert stored["calibration"]["sequences"] == WINDOWS
    monkeypatch.setattr("bitmill.config.effort.WINDOWS", 7)
    assert parse(stored).calibration.sequences == WINDOWS
    stored["calibration"]["sequences"] = DEFAULT  # from before effort filled it
    assert parse(stored).calibration.sequences == DEFAULT


def test_a_job_hands_on_what_it_stored():
    spec = parse_spec(MODEL | {"budget": {"bits": 3}, "effort": "balanced"})
    assert isinstance(spec, JobSpec)
    assert spec.config().method == method(effort="balanced")
    assert spec.config().effort == "balanced"
    best = {"budget": {"bits": 3}, "effort": "best", "code": "trellis"}
    assert parse_spec(MODEL | best).config() == parse_config(best)


@pytest.mark.parametrize("wrong", ["worst", "", None, 3, ["best"], {}])
def test_an_unknown_effort_is_refused_by_name(wrong):
    with pytest.raises(SpecError) as error:
        parse_config({"budget": {"bits": 3}, "effort": wrong})
    assert error.value.param == "effort"
