"""The summary holds the profile's own numbers, for the map that was allocated."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitmill.allocation.allocator import allocate
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Allocation, Budget, QuantizationConfig
from bitmill.errors import FormatError
from bitmill.formats.accounting import footprint
from bitmill.reporting.summary import ProfileSummary, summarize
from plans import llama_plan, random_profile

ALLOCATION = Allocation(method="knapsack", order="natural", widths=(2, 3, 4, 5, 6))

UNIFORM = QuantizationConfig(
    budget=Budget(code_bits=2),
    allocation=Allocation(method="uniform", order="natural"),
)


@pytest.fixture(scope="module")
def summary() -> ProfileSummary:
    plan = llama_plan()
    spec = QuantizationConfig(budget=Budget(code_bits=3.2), allocation=ALLOCATION)
    profile = random_profile(plan)
    found = summarize(plan, ALLOCATION, profile, allocate(plan, spec, profile), points=9)
    assert found is not None
    return found


def test_losses_add_up_to_the_profile_s_prediction(summary: ProfileSummary) -> None:
    plan = llama_plan()
    profile = random_profile(plan)
    spec = QuantizationConfig(budget=Budget(code_bits=3.2), allocation=ALLOCATION)
    bit_widths = allocate(plan, spec, profile)
    total = sum(linear.predicted_loss for linear in summary.linears.values())
    assert total == pytest.approx(profile.predicted_loss(bit_widths.linears), rel=1e-3)
    assert summary.linears.keys() == bit_widths.linears.keys()
    assert summary.profile_id == profile.key


def test_groups_are_costs_at_the_width_nearest_to_the_mean(summary: ProfileSummary) -> None:
    profile = random_profile(llama_plan())
    assert summary.reference_width == 3
    for name, linear in summary.linears.items():
        expected = profile.linear(name).costs[:, profile.widths.index(3)]
        assert linear.groups == pytest.approx(tuple(expected), rel=1e-3)


def test_the_curve_falls_from_the_smallest_size_to_the_largest(summary: ProfileSummary) -> None:
    plan = llama_plan()
    losses = [point.predicted_loss for point in summary.curve]
    sizes = [point.size for point in summary.curve]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    lowest = {shape.name: (2,) * shape.groups for shape in plan.shapes}
    assert summary.curve[0].size == footprint(plan, BitWidthMap(linears=lowest)).size


def test_a_profile_without_these_widths_has_no_summary() -> None:
    plan = llama_plan()
    bit_widths = allocate(plan, UNIFORM, None)
    assert summarize(plan, ALLOCATION, random_profile(plan, widths=()), bit_widths) is None


def test_files_are_read_back_and_others_refused(summary: ProfileSummary, tmp_path: Path) -> None:
    path = tmp_path / "profile_summary.json"
    path.write_text(summary.to_json())
    assert ProfileSummary.load(path) == summary
    path.write_text('{"schema_version": 2}')
    with pytest.raises(FormatError, match="not a profile summary"):
        ProfileSummary.load(path)
