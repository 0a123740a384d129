"""Numbers of outlier columns, chosen against spending the same bytes on widths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bitmill.allocation.allocator import Allocator, allocate
from bitmill.allocation.groups import GroupTable
from bitmill.allocation.outliers import outlier_choices
from bitmill.allocation.profile import LinearProfile, SensitivityProfile
from bitmill.config.bit_width_map import BitWidthMap, group_bytes, group_columns
from bitmill.config.quantization import Allocation, Budget, parse_config
from bitmill.errors import FormatError, SpecError
from bitmill.formats.accounting import checkpoint_tensors, footprint, measure_map
from bitmill.io.safetensors import checkpoint_bytes
from plans import llama_plan, random_profile

PLAN = llama_plan()
COUNTS = (1, 4)
WIDTHS = (2, 3, 4, 5, 6)
PLAIN, KEEPING = Allocation(widths=WIDTHS), Allocation(widths=WIDTHS, outliers=COUNTS)


def with_outliers(leaves: dict[str, float]) -> SensitivityProfile:
    """A profile in which an outlier column leaves so much of the costs of linears of a kind, four
    columns the square of that, and nothing is gained elsewhere."""
    made = random_profile(PLAN)
    linears = []
    for linear in made.linears:
        left = leaves.get(linear.name.rpartition(".")[2], 1.0)
        tables = np.stack([linear.costs * left, linear.costs * left**2])
        linears.append(replace(linear, kept=tables))
    return replace(made, linears=tuple(linears), outliers=COUNTS)


PROFILE = with_outliers({"q_proj": 0.3, "up_proj": 0.9})
KINDS = ("code_bits", "bits", "size")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2.5, 3.0])
def test_a_map_with_outliers_costs_less_within_the_same_budget(kind: str, bits: float) -> None:
    without = Allocator(PLAN, PLAIN, PROFILE).knapsack(Budget(code_bits=bits))
    amount = getattr(footprint(PLAN, without), kind)
    budget = Budget(**{kind: amount})
    plain = Allocator(PLAN, PLAIN, PROFILE).knapsack(budget)
    found = Allocator(PLAN, KEEPING, PROFILE).knapsack(budget)
    assert getattr(footprint(PLAN, found), kind) <= amount
    assert {name.rpartition(".")[2] for name in found.outliers} >= {"q_proj"}
    assert set(found.outliers.values()) <= set(COUNTS)
    assert PROFILE.predicted(found) < PROFILE.predicted(plain)


@pytest.mark.parametrize("counts", [COUNTS, (1, 416)])
def test_every_price_has_the_numbers_that_cost_least(counts: tuple[int, ...]) -> None:
    profile = replace(PROFILE, outliers=counts)
    asked = Allocation(widths=WIDTHS, outliers=counts)
    column = [profile.widths.index(width) for width in WIDTHS]

    def cost(linear: LinearProfile, count: int, price: float) -> float:
        table = linear.kept[counts.index(count)] if count else linear.costs
        weights = [
            [group_bytes(width, linear.rows, columns) for width in WIDTHS]
            for columns in group_columns(linear.columns)
        ]
        best = (table[:, column] + price * np.array(weights)).min(1).sum()
        return float(best) + price * count * (2 * linear.rows + 4)

    found = set()
    for price in np.geomspace(1e-9, 1e-2, 15):
        choice = {}
        for linear in PROFILE.linears:
            able = [count for count in (0, *counts) if count < linear.columns]
            if best := min(able, key=lambda count: cost(linear, count, price)):
                choice[linear.name] = best
        chosen = outlier_choices(GroupTable(PLAN, asked), profile, [price])
        assert chosen == [choice] * bool(choice)
        found |= {len(choice)}
    assert len(found) > 2


def test_outliers_that_gain_nothing_are_not_taken() -> None:
    profile = with_outliers({})
    found = Allocator(PLAN, KEEPING, profile).knapsack(Budget(bits=3))
    assert found == Allocator(PLAN, PLAIN, profile).knapsack(Budget(bits=3))


def test_every_byte_of_them_is_counted() -> None:
    name = PLAN.linears[0].name
    plain = BitWidthMap.uniform(PLAN.shapes, 3, "activation")
    found = plain.model_copy(update={"outliers": {name: 4}})
    rows = PLAN.linears[0].rows
    added = {
        kind: measure_map(PLAN, found, kind) - measure_map(PLAN, plain, kind) for kind in KINDS
    }
    assert added["bits"] == 4 * (2 * rows + 4)
    assert added["code_bits"] == 4 * 16 * rows
    tensors = checkpoint_tensors(PLAN, found.linears, "activation", found.outliers)
    assert footprint(PLAN, found).size == checkpoint_bytes(tensors)
    named = {tensor.name: tensor for tensor in tensors}
    beside = [named[f"{name}.{key}"] for key in ("outlier_columns", "outliers")]
    assert sum(tensor.nbytes for tensor in beside) == added["bits"]


def test_profiles_and_maps_are_stored_with_them_and_read_back() -> None:
    again = SensitivityProfile.from_bytes(PROFILE.to_bytes())
    assert again.outliers == COUNTS
    for linear in PROFILE.linears:
        np.testing.assert_array_equal(again.linear(linear.name).kept, linear.kept)
    found = BitWidthMap(linears={"a": (3,), "b": (2,)}, outliers={"b": 2})
    assert BitWidthMap.model_validate_json(found.to_json()) == found
    assert "outliers" not in BitWidthMap(linears={"a": (3,)}).to_json()


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        SpecError, match=r"outliers \[2\] are not in the profile, which has \[1, 4\]"
    ):
        Allocator(PLAN, Allocation(widths=WIDTHS, outliers=(2,)), PROFILE).knapsack(Budget(bits=3))
    with pytest.raises(ValueError, match="outliers of c, which has no widths"):
        BitWidthMap(linears={"a": (3,)}, outliers={"c": 1})
    name = PLAN.linears[0].name
    whole = BitWidthMap.uniform(PLAN.shapes, 3).model_copy(update={"outliers": {name: 416}})
    with pytest.raises(FormatError, match="keeps 416 outlier columns"):
        whole.check_shapes(PLAN.shapes)
    spec = {"budget": {"bits": 4}, "allocation": {"method": "map", "map": whole.model_dump()}}
    with pytest.raises(FormatError, match="keeps 416 outlier columns"):
        allocate(
            PLAN, parse_config(spec | {"allocation": spec["allocation"] | {"order": "natural"}})
        )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"allocation": {"method": "uniform"}}, "only 'knapsack' can choose them"),
        ({"allocation": {"method": "sba"}}, "only 'knapsack' can choose them"),
        ({"code": "trellis"}, "code 'trellis', which have no place for them"),
        ({"refinement": {"method": "omniquant"}}, "refinement 'omniquant'"),
        ({"refinement": {"method": "hqq"}}, "refinement 'hqq'"),
        ({"budget": {"max_loss_increase": 0.1}}, "no target of loss is searched for with outliers"),
    ],
)
def test_what_has_no_place_for_them_refuses_by_name(asked: dict, message: str) -> None:
    spec = {"budget": {"bits": 3}} | asked
    spec["allocation"] = spec.get("allocation", {}) | {"outliers": [4, 1]}
    with pytest.raises(SpecError, match=message):
        parse_config(spec)
