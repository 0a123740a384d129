"""A budget that a method cannot spend is said so, with the next size that it would."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bitmill.allocation.allocator import allocate
from bitmill.allocation.unspent import unspent_warning
from bitmill.config.quantization import QuantizationConfig, parse_config
from bitmill.formats.accounting import footprint, measure
from bitmill.plan.attention_cache import CacheLayer
from bitmill.plan.serving_memory import beside_weights
from plans import llama_plan, random_profile

PLAN = llama_plan()
PROFILE = random_profile(PLAN, sba=(2, 3, 4))


def job(budget: dict[str, Any], **allocation: Any) -> QuantizationConfig:
    widths = {"widths": (1, 2, 3, 4, 5, 6)}
    return parse_config({"budget": budget, "allocation": widths | allocation})


def warned(config: QuantizationConfig) -> str | None:
    return unspent_warning(PLAN, config, allocate(PLAN, config, PROFILE))


@pytest.mark.parametrize("method", ["uniform", "sba"])
@pytest.mark.parametrize("kind", ["code_bits", "bits", "size"])
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_the_next_size_that_is_named_would_be_spent(method: str, kind: str, order: str) -> None:
    named = {shape.name: (4,) * shape.groups for shape in PLAN.shapes}
    four = measure(PLAN, named, order, kind)
    short = {"size": four - 1, "bits": 8 * (four - 1) / PLAN.weights}
    budget = {kind: short.get(kind, 3.99)}
    said = warned(job(budget, method=method, order=order))
    assert said is not None
    assert "4 needs" in said
    found = re.search(rf"4 needs {kind} = ([\d.,]+)( bytes)?", said)
    assert found is not None
    asked = float(found[1].rstrip(".,").replace(",", ""))
    enough = {kind: int(asked) if kind == "size" else asked}
    again = allocate(PLAN, job(enough, method="uniform", order=order), PROFILE)
    assert {w for widths in again.linears.values() for w in widths} == {4}


@pytest.mark.parametrize("budget", [{"bits": 3.25}, {"code_bits": 2.7}, {"size": 2_000_000}])
def test_knapsack_spends_what_it_is_given(budget: dict[str, Any]) -> None:
    assert warned(job(budget, method="knapsack")) is None


@pytest.mark.parametrize("method", ["knapsack", "uniform"])
def test_a_budget_above_the_largest_width_names_it(method: str) -> None:
    said = warned(job({"bits": 9}, method=method))
    assert said is not None
    assert "the largest width allowed is 6" in said


def test_all_of_a_budget_is_unspent_only_where_nothing_is_taken() -> None:
    said = warned(job({"size": 2**40}, method="knapsack"))
    assert said is not None
    assert " 99 % stays unspent" in said


def test_a_given_map_asks_for_no_more() -> None:
    config = job({"bits": 3.25}, method="uniform")
    chosen = allocate(PLAN, config)
    given = {"method": "map", "map": chosen.model_dump(mode="json")}
    said = warned(job({"bits": 5}, **given))
    assert said is not None
    assert "the given map asks for no more" in said


def test_bits_and_code_bits_explain_each_other() -> None:
    config = job({"bits": 3.1}, method="uniform")
    said, spent = warned(config), footprint(PLAN, allocate(PLAN, config))
    assert said is not None
    assert f"{spent.code_bits:.3f} code_bits" in said
    assert f"{spent.bits:.3f} bits" in said


def test_memory_counts_tokens_and_workspace_as_taken() -> None:
    budget = {"memory": 2**30, "context": 64}
    plan = PLAN.model_copy(update={"cache": (CacheLayer(values=192),) * 3})
    config = job(budget, method="knapsack")
    chosen = allocate(plan, config, PROFILE)
    said, beside = unspent_warning(plan, config, chosen), beside_weights(plan, config.budget)
    taken = footprint(plan, chosen).size + beside
    assert said is not None
    assert beside > 0
    assert f"the map takes {taken:,} bytes with 1 x 64 tokens and workspace" in said
    assert f" {100 * (2**30 - taken) // 2**30} % stays unspent" in said
