from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitmill.allocation.profile import (
    LinearProfile,
    ProfileConfig,
    ProfileOrigin,
    SbaRecord,
    SensitivityProfile,
)
from bitmill.errors import FormatError
from plans import llama_plan, random_profile

ORIGIN = ProfileOrigin(ProfileConfig(sequences=4), "model", "text")
FIXTURES = Path(__file__).parents[2] / "fixtures"
GOLDEN = Path(__file__).parents[1] / "golden" / "profile_v1.npz"


def small_profile() -> SensitivityProfile:
    order = np.array([3, 1, 0, 2], dtype=np.int32)
    costs = np.array([[0.5, 0.25, 0.125]])
    return SensitivityProfile(
        origin=ORIGIN,
        widths=(2, 3, 4),
        linears=(
            LinearProfile("a", 8, 4, costs, order="a"),
            LinearProfile("b", 2, 256, np.array([[1.0, 0.5, 0.1], [2.0, 0.75, 0.2]])),
        ),
        orders={"a": order},
        sba={3: {"b": SbaRecord(np.array([1, 0], dtype=np.int32), np.array([0.4, 0.3]))}},
    )


def test_stored_and_read_back(tmp_path):
    profile = small_profile()
    profile.save(tmp_path / "profile.npz")
    again = SensitivityProfile.load(tmp_path)
    assert again.widths == (2, 3, 4)
    assert [linear.name for linear in again.linears] == ["a", "b"]
    np.testing.assert_array_equal(again.linear("b").costs, profile.linear("b").costs)
    assert again.linear("a").order == "a"
    assert again.linear("b").order is None
    np.testing.assert_array_equal(again.orders["a"], [3, 1, 0, 2])
    np.testing.assert_array_equal(again.sba[3]["b"].salience, [1, 0])
    np.testing.assert_array_equal(again.sba[3]["b"].kl, [0.4, 0.3])
    assert again.origin == profile.origin
    assert again.digest == profile.digest
    assert again.key == profile.key


def test_stored_bytes_are_pinned():
    assert small_profile().to_bytes() == GOLDEN.read_bytes()


def test_version_1_is_still_read():
    golden = SensitivityProfile.load(GOLDEN)
    assert golden.predicted_loss({"a": (4,), "b": (2, 3)}) == 0.125 + 1.0 + 0.75


def test_key_depends_on_model_text_and_settings():
    profile = small_profile()
    keys = {profile.key}
    other = ProfileConfig(sequences=5)
    for change in ({"model_digest": "x"}, {"calibration_digest": "x"}, {"config": other}):
        keys.add(profile.of(dataclasses.replace(profile.origin, **change)).key)
    assert len(keys) == 4


def test_an_id_of_commit_7c5cfe5_is_kept():
    """The same settings gave it there, as a dict."""
    config = ProfileConfig(
        kind="knapsack",
        order="activation",
        keep=(),
        widths=(1, 2, 3, 4, 5, 6, 8),
        dtype="torch.float32",
        seed=3,
        threads=1,
        device="cpu",
        devices=1,
        torch="2.13.0+cpu",
    )
    made = FIXTURES / "made-by-7c5cfe5" / "profiles"
    stored = [SensitivityProfile.load(folder) for folder in sorted(made.iterdir())]
    assert [profile.key for profile in stored] == [folder.name for folder in sorted(made.iterdir())]
    assert config in [profile.origin.config for profile in stored]
    for profile, folder in zip(stored, sorted(made.iterdir()), strict=True):
        assert profile.to_bytes() == (folder / "profile.npz").read_bytes()


def test_settings_of_a_later_version_are_refused_by_name():
    profile = small_profile()
    arrays = dict(np.load(io.BytesIO(profile.to_bytes())))
    header = json.loads(arrays["header"].tobytes())
    header["settings"] |= {"rotation": "hadamard"}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with pytest.raises(FormatError, match=r"profile setting rotation: .*make it again"):
        SensitivityProfile.from_bytes(buffer.getvalue())


def test_predicted_loss_adds_the_chosen_costs():
    profile = small_profile()
    assert profile.predicted_loss({"a": (4,), "b": (2, 3)}) == 0.125 + 1.0 + 0.75


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"a": (5,)}, "not measured"),
        ({"a": (2, 2)}, "2 widths for 1 groups"),
        ({"c": (2,)}, "no linear 'c'"),
    ],
)
def test_predicted_loss_refuses_what_was_not_measured(widths, message):
    with pytest.raises(FormatError, match=message):
        small_profile().predicted_loss(widths)


def test_another_models_shapes_are_refused():
    profile = random_profile(llama_plan())
    profile.check_shapes(llama_plan().shapes)
    with pytest.raises(FormatError, match="in the model but"):
        profile.check_shapes(llama_plan(hidden=448).shapes)
    with pytest.raises(FormatError, match="no linear"):
        profile.check_shapes(llama_plan(blocks=4).shapes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (3, 2, 4)}, "must ascend"),
        ({"widths": (2, 3, 9)}, "be among"),
        ({"widths": (2, 3)}, "expected float64"),
        ({"orders": {}}, "which is missing"),
        ({"orders": {"a": np.array([0, 1, 2, 2], dtype=np.int32)}}, "no permutation"),
        ({"sba": {3: {"b": SbaRecord(np.array([0], np.int32), np.ones(1))}}}, "2 full groups"),
        ({"sba": {3: {"b": SbaRecord(np.array([0, 1], np.int32), np.ones(3))}}}, "3 KL values"),
    ],
)
def test_inconsistent_parts_are_refused(change, message):
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(small_profile(), **change)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_costs_must_be_finite_and_not_negative(bad):
    linear = LinearProfile("a", 8, 4, np.array([[1.0, bad]]))
    with pytest.raises(FormatError, match="finite and not negative"):
        SensitivityProfile(ORIGIN, (2, 3), (linear,))


@pytest.mark.parametrize("cut", [0, 1, 100, 700])
def test_a_damaged_file_is_refused(tmp_path, cut):
    path = tmp_path / "profile.npz"
    path.write_bytes(small_profile().to_bytes()[:cut])
    with pytest.raises(FormatError, match=r"profile\.npz"):
        SensitivityProfile.load(path)


def rewritten(**changes) -> bytes:
    with np.load(io.BytesIO(small_profile().to_bytes())) as stored:
        arrays = {name: stored[name] for name in stored}
    header = json.loads(arrays["header"].tobytes()) | changes
    header = {key: value for key, value in header.items() if value is not None}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version 2"),
        ({"extra": 1}, "unknown keys"),
        ({"orders": None}, "missing or unknown"),
        ({"linears": [["a", 8, 400, None]]}, "shorter than the header"),
        ({"linears": [["a"]]}, "not a sensitivity profile"),
        ({"widths": "abc"}, "must ascend"),
        ({"widths": 3}, "not a sensitivity profile"),
    ],
)
def test_a_foreign_header_is_refused(change, message):
    with pytest.raises(FormatError, match=message):
        SensitivityProfile.from_bytes(rewritten(**change))


def test_a_pickle_inside_is_never_loaded():
    class Hostile:
        def __reduce__(self):
            return print, ("executed",)

    buffer = io.BytesIO()
    np.savez(buffer, header=np.array([Hostile()], dtype=object))
    with pytest.raises(FormatError, match="not a sensitivity profile"):
        SensitivityProfile.from_bytes(buffer.getvalue())


def test_allocation_loads_no_torch():
    code = "import sys, bitmill.allocation.allocator; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
