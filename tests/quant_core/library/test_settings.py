"""Keywords of the library's functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bitmill import GPTQ, OmniQuant
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import (
    KINDS,
    Allocation,
    Budget,
    Calibration,
    Evaluation,
    FileText,
    QuantizationConfig,
    Refinement,
)
from bitmill.errors import ModelError, SpecError
from bitmill.library.settings import PARTS, configuration, model_files

BASE = QuantizationConfig(
    budget=Budget(code_bits=3),
    allocation=Allocation(order="natural", widths=(2, 4)),
    refinement=OmniQuant(epochs=2),
    calibration=Calibration(sequences=5),
    seed=7,
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"bits": 2.5}, {"budget": Budget(bits=2.5)}),
        ({"size": 1000}, {"budget": Budget(size=1000)}),
        ({"budget": {"bits": 2}}, {"budget": Budget(bits=2)}),
        ({"order": "activation"}, {"allocation": Allocation(widths=(2, 4))}),
        ({"allocation": "sba"}, {"allocation": Allocation(method="sba")}),
        (
            {"allocation": "sba", "order": "natural"},
            {"allocation": Allocation(method="sba", order="natural")},
        ),
        ({"allocation": Allocation()}, {"allocation": Allocation()}),
        (
            {"allocation_method": "uniform"},
            {"allocation": Allocation(method="uniform", order="natural", widths=(2, 4))},
        ),
        ({"refinement": "rtn"}, {"refinement": Refinement(method="rtn")}),
        (
            {"refinement": GPTQ(asymmetric=False)},
            {"refinement": Refinement(asymmetric=False)},
        ),
        (
            {"clip_search": False},
            {"refinement": Refinement.of(OmniQuant(epochs=2, clip_search=False))},
        ),
        (
            {"calibration_length": 64, "evaluation_length": 32, "held_out": 3},
            {
                "calibration": Calibration(sequences=5, length=64, held_out=3),
                "evaluation": Evaluation(length=32),
            },
        ),
        (
            {"text": "notes.txt"},
            {"calibration": Calibration(sequences=5, text=FileText(path="notes.txt"))},
        ),
        (
            {"calibration": {"text": Path("notes.txt")}},
            {"calibration": Calibration(text=FileText(path="notes.txt"))},
        ),
        ({"seed": 1, "threads": 2}, {"seed": 1, "threads": 2}),
    ],
)
def test_keywords_stand_in_place_of_the_configuration(
    given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert configuration(BASE, given) == BASE.model_copy(update=expected)


def test_every_field_of_every_part_has_a_keyword() -> None:
    """The value of a configuration, given back to it by its own keyword, changes nothing."""
    for part, kind in PARTS.items():
        value = getattr(BASE, part)
        for field in kind.model_fields:
            if field not in KINDS or getattr(value, field) is not None:
                given = {f"{part}_{field}": getattr(value, field)}
                assert configuration(BASE, given) == BASE, given


@pytest.mark.parametrize(
    ("given", "code", "param", "said"),
    [
        ({"bitz": 3}, "unknown_setting", "bitz", "did you mean 'bits'"),
        ({"xyzzy": 3}, "unknown_setting", "xyzzy", "docs/library.md"),
        (
            {"length": 3},
            "ambiguous_setting",
            "length",
            "calibration_length or evaluation_length",
        ),
        (
            {"method": "sba"},
            "ambiguous_setting",
            "method",
            "allocation_method or refinement_method",
        ),
        ({"bits": 3, "size": 5}, "invalid_spec", "budget", "exactly one"),
        ({"bits": 3, "budget": Budget(size=5)}, "invalid_spec", "budget", "exactly one"),
        ({"bits": 0}, "invalid_spec", "budget.bits", "greater than 0"),
        ({"allocation": {"ordr": 1}}, "invalid_spec", "allocation.ordr", "not permitted"),
        ({"refinement": "none"}, "invalid_spec", "refinement", "'none' is unknown"),
        ({"map": "there-is-no.json"}, "invalid_format", None, "there-is-no.json"),
    ],
)
def test_what_cannot_be_set_is_refused_by_name(
    given: dict[str, Any], code: str, param: str | None, said: str
) -> None:
    with pytest.raises(Exception, match=said) as caught:
        configuration(BASE, given)
    assert (caught.value.code, caught.value.param) == (code, param)  # type: ignore[attr-defined]


def test_effort_decides_what_nobody_decided() -> None:
    fast = QuantizationConfig(budget=Budget(bits=3))
    best = QuantizationConfig(budget=Budget(bits=3), effort="best")
    assert configuration(fast, {"effort": "best"}) == best
    assert configuration(best, {"effort": "fast"}) == fast
    assert configuration(BASE, {"effort": "best"}).refinement == BASE.refinement
    assert configuration(None, {"bits": 3, "effort": "best"}) == best
    assert configuration(best, {"seed": 1}).refinement == best.refinement


def test_effort_decides_how_many_windows_where_nobody_did() -> None:
    def made(**settings: Any) -> QuantizationConfig:
        return configuration(None, {"bits": 3, "code": "trellis"} | settings)

    fast, best = made(), made(effort="best")
    assert (fast.calibration.sequences, best.calibration.sequences) == (64, 160)
    assert configuration(fast, {"effort": "best"}) == best
    assert configuration(best, {"effort": "fast"}) == fast
    assert configuration(best, {"seed": 1}).calibration == best.calibration
    short = made(effort="best", calibration=Calibration(length=128), held_out=2)
    assert (short.calibration.sequences, short.calibration.length) == (160, 128)
    assert configuration(short, {"effort": "fast"}).calibration.length == 128
    assert configuration(short, {"effort": "fast"}).calibration.sequences == 64
    given = made(calibration_sequences=64, profile_sequences=64)
    assert configuration(given, {"effort": "best"}).calibration == given.calibration
    many = made(effort="best", calibration_sequences=196, profile_sequences=196)
    assert configuration(many, {"effort": "fast"}).calibration == many.calibration


def test_a_budget_is_needed() -> None:
    with pytest.raises(SpecError, match="budget") as caught:
        configuration(None, {"order": "natural"})
    assert caught.value.param == "budget"


def test_objects_refuse_what_they_do_not_know() -> None:
    for kind in (Budget, Allocation, GPTQ, OmniQuant, QuantizationConfig):
        with pytest.raises(ValidationError, match="bitz"):
            kind(bitz=3)
    with pytest.raises(ValidationError, match="no_method"):
        QuantizationConfig(budget=Budget(bits=3), refinement={"method": "no_method"})


def test_maps_are_read_as_the_command_line_reads_them(tmp_path: Path) -> None:
    given = BitWidthMap(linears={"model.layers.0.mlp.up_proj": (3, 4)})
    (tmp_path / "bit_width_map.json").write_text(given.to_json())
    for place in (tmp_path, tmp_path / "bit_width_map.json", str(tmp_path), given):
        asked = configuration(BASE, {"allocation_method": "map", "map": place})
        assert asked.allocation.map == given


def test_a_model_is_a_folder_or_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "model.bin").touch()
    assert model_files(tmp_path) == (tmp_path, None)
    assert model_files(str(tmp_path / "model.gguf")) == (tmp_path, "model.gguf")
    for name, said in (("model.bin", "is no GGUF file"), ("model", "is not there")):
        with pytest.raises(ModelError, match=said) as caught:
            model_files(tmp_path / name)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
