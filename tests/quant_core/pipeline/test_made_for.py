"""A bit-width map knows which model it was made for, and is not taken for another in silence."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import bitmill
from bitmill.config.bit_width_map import MAP_NAME, BitWidthMap
from bitmill.config.made_for import MADE_FOR_NAME, MadeFor, foreign_map
from bitmill.config.quantization import parse_config
from bitmill.errors import FormatError
from bitmill.pipeline.job import run_job
from bitmill.plan.fingerprint import Fingerprint
from tiny import tinier_llama

TEXT = {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")}


def config(method, given=None):
    return parse_config(
        {
            "budget": {"bits": 4.3},
            "allocation": {"method": method, "order": "natural"}
            | ({"map": given} if given else {}),
            "refinement": {"method": "rtn"},
            "calibration": {"text": TEXT, "sequences": 4, "length": 64, "held_out": 0},
            "evaluation": {"texts": [], "length": 64},
            "threads": 1,
        }
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tinier_llama(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """The same shapes with other weights."""
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    shutil.copytree(base, folder)
    file = folder / "model.safetensors"
    save_file({name: 1.25 * one for name, one in load_file(file).items()}, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def packed(base, tmp_path_factory):
    """A result of the base, with a map of its own."""
    folder = tmp_path_factory.mktemp("packed")
    return run_job(config("uniform"), base, folder / "work", folder / "out")


def use(given, model, folder, **options):
    """The job of a given map, and the warnings that it told while it ran."""
    told = []
    note = lambda progress: progress.kind == "warning" and told.append(progress.message)  # noqa: E731
    made = run_job(
        config("map", given), model, folder / "work", folder / "out", on_progress=note, **options
    )
    return made, told


def test_a_result_says_what_its_map_was_made_for_beside_the_map(base, packed):
    print_ = Fingerprint.of_folder(base, weights=True)
    expected = MadeFor(shape=print_.shape, weights=print_.weights, model="base")
    assert packed.map.made_for == expected
    assert MadeFor.beside(packed.folder) == expected
    assert "made_for" not in json.loads((packed.folder / MAP_NAME).read_text())
    assert MADE_FOR_NAME in packed.manifest.files


@pytest.mark.e2e
def test_a_map_of_another_model_is_used_with_a_warning_that_names_both(
    base, tuned, packed, tmp_path
):
    made, told = use(packed.map, tuned, tmp_path)
    ours = MadeFor(**dict(Fingerprint.of_folder(tuned, weights=True)), model="tuned")
    (warning,) = told
    assert f"was made for {packed.map.made_for}, not for {ours}:" in warning
    assert warning in made.quality.warnings
    assert "base (weights " in warning
    assert warning in repr(made)
    assert made.map == packed.map
    assert made.map.made_for == packed.map.made_for  # not of the model that it was used for
    again, told = use(made.map, base, tmp_path / "back")
    assert (told, again.quality.warnings) == ([], ())
    assert use(made.map, tuned, tmp_path / "again")[1] == [warning]


@pytest.mark.e2e
def test_the_same_weights_elsewhere_are_no_other_model(base, packed, tmp_path):
    moved = tmp_path / "renamed"
    shutil.copytree(base, moved)
    (moved / "LICENSE").write_text("another file")
    made, told = use(packed.map, moved, tmp_path)
    assert (told, made.quality.warnings) == ([], ())


@pytest.mark.e2e
def test_a_map_that_does_not_say_is_used_with_a_warning(base, packed, tmp_path):
    made, (warning,) = use(packed.map.of(None), base, tmp_path, model_name="org/base")
    assert warning.startswith("the bit-width map does not say for which model it was made; ")
    assert "org/base (weights " in warning
    assert made.map.made_for is None
    assert not (made.folder / MADE_FOR_NAME).exists()


@pytest.mark.e2e
def test_profiles_and_what_is_allocated_on_them_say_their_model(base, tuned, tmp_path):
    settings = {"order": "natural", "calibration": {"text": TEXT, "sequences": 4, "length": 64}}
    profiled = bitmill.profile(base, **settings)
    profiled.save(tmp_path / "kept")
    found = bitmill.allocate(tmp_path / "kept", bits=5).map
    assert found.made_for == profiled.made_for
    assert found.made_for.weights == Fingerprint.of_folder(base, weights=True).weights
    made = bitmill.refine(
        tuned, found, out=tmp_path / "out", refinement="rtn", texts=(), **settings
    )
    assert any("was made for base (weights " in warning for warning in made.quality.warnings)


@pytest.mark.e2e
def test_a_profile_under_another_ones_id_is_measured_anew(base, tuned, tmp_path):
    settings = {"order": "natural", "calibration": {"text": TEXT, "sequences": 4, "length": 64}}
    of_tuned = bitmill.profile(tuned, **settings)
    other = bitmill.profile(base, **settings, profiles=tmp_path / "profiles")
    (tmp_path / "profiles" / other.profile.key).rename(tmp_path / "profiles" / of_tuned.profile.key)
    told = []
    found = bitmill.profile(
        tuned, **settings, profiles=tmp_path / "profiles", progress=lambda one: told.append(one)
    )
    assert found.profile.digest == of_tuned.profile.digest
    assert found.profile.digest != other.profile.digest
    assert any("was made from another model" in (one.message or "") for one in told)


def test_maps_are_compared_by_their_widths():
    one = BitWidthMap(linears={"a": (3, 4)})
    assert one == one.of(MadeFor(model="x"))
    assert one != BitWidthMap(linears={"a": (3, 3)})
    assert (
        BitWidthMap.model_validate_json(one.of(MadeFor(model="x")).to_json()).made_for is not None
    )


def test_a_map_of_a_model_whose_weights_are_unknown_is_told_as_that():
    model = MadeFor(shape="a" * 64, weights="b" * 64, model="mine")
    note = foreign_map(MadeFor(shape="a" * 64, model="theirs"), model)
    assert note is not None
    assert "theirs (shape aaaaaaaaaaaa); whether that is mine (weights bbbbbbbbbbbb)" in note


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b'{"schema_version": 2}', b'{"schema_version":1,"x":1}']
)
def test_damaged_records_are_refused_by_name(text):
    with pytest.raises(FormatError, match=r"made_for\.json cannot be read"):
        MadeFor.parse(text)
