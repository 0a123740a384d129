"""New budgets for a stored profile: exact sizes, predicted loss, no runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bitmill.allocation.allocator import Allocator
from bitmill.allocation.profile import SensitivityProfile
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Allocation
from bitmill.formats.accounting import footprint
from bitmill.plan.model_plan import Plan, PlannedLinear, Source
from finished import Stack
from plans import llama_plan, random_profile


@pytest.fixture(scope="module")
def plan() -> Plan:
    return llama_plan(blocks=2)


@pytest.fixture(scope="module")
def profile(plan: Plan) -> SensitivityProfile:
    return random_profile(plan, widths=(2, 3, 4, 5), sba=(3,))


@pytest.fixture(scope="module")
def url(stack: Stack, plan: Plan, profile: SensitivityProfile) -> str:
    return f"/v1/profiles/{stack.profile(plan, profile)}"


def allocate(http: httpx2.Client, url: str, **request: Any) -> httpx2.Response:
    return http.post(f"{url}/allocate", json=request)


def test_profiles_are_listed_and_described(
    http: httpx2.Client, url: str, profile: SensitivityProfile
) -> None:
    listed = http.get("/v1/profiles").json()["profiles"]
    assert profile.key in [p["id"] for p in listed]
    one = http.get(url).json()
    assert (one["widths"], one["linears"]) == ([2, 3, 4, 5], 14)
    assert one["groups"] == sum(len(p.costs) for p in profile.linears)


@pytest.mark.parametrize(
    ("kind", "value"), [("code_bits", 3.1), ("bits", 3.4), ("size", 1_700_000)]
)
def test_map_keeps_the_budget_and_its_cost_is_exact(
    http: httpx2.Client, url: str, plan: Plan, profile: SensitivityProfile, kind: str, value: float
) -> None:
    answer = allocate(http, url, budget={kind: value})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found[kind] <= value
    made = BitWidthMap.model_validate(found["map"])
    cost = footprint(plan, made)
    assert (found["size"], found["bits"]) == (cost.size, cost.bits)
    assert found["predicted_loss"] == pytest.approx(profile.predicted_loss(made.linears))


def test_curve_falls_and_marks_what_is_impossible(http: httpx2.Client, url: str) -> None:
    found = allocate(http, url, budget={"code_bits": 3}, curve=[-1, 1.5, 2.5, 3.5, 4.5]).json()
    none, first, *rest = found["curve"]
    assert none["error"] == "code_bits: Input should be greater than 0"
    assert "cannot be met" in first["error"]
    losses = [point["predicted_loss"] for point in rest]
    assert losses == sorted(losses, reverse=True)
    assert [point["code_bits"] <= point["budget"] for point in rest] == [True] * 3


def test_whole_curve_comes_unasked(
    http: httpx2.Client, url: str, plan: Plan, profile: SensitivityProfile
) -> None:
    found = allocate(http, url, budget={"bits": 3.4}).json()
    expected = Allocator(plan, Allocation(widths=profile.widths, order="natural"), profile)
    points = expected.curve(32)
    assert [point["size"] for point in found["curve"]] == [point.size for point in points]
    assert [point["budget"] for point in found["curve"]] == [point.bits for point in points]
    losses = [point["predicted_loss"] for point in found["curve"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > found["predicted_loss"] > losses[-1]


@pytest.mark.parametrize(
    ("name", "value"), [("embeddings", "quantize"), ("order", "activation"), ("keep", ["*o_proj"])]
)
def test_groups_that_the_profile_does_not_have_are_refused(
    http: httpx2.Client, url: str, name: str, value: object
) -> None:
    answer = allocate(http, url, budget={"code_bits": 3}, allocation={name: value})
    assert (answer.status_code, answer.json()["param"]) == (422, f"allocation.{name}")


def test_quantized_embeddings_of_the_profile_are_counted_or_the_difference_refused(
    http: httpx2.Client, stack: Stack, plan: Plan
) -> None:
    matrix = PlannedLinear(
        name="model.embed_tokens",
        block=-1,
        rows=512,
        columns=416,
        dtype="F32",
        source=Source(tensor="model.embed_tokens.weight"),
    )
    tensors = tuple(t for t in plan.tensors if t.name != "model.embed_tokens.weight")
    changes = {"embeddings": (matrix,), "tensors": tensors}
    wider = Plan.model_validate(plan.model_dump() | changes)
    key = stack.profile(wider, random_profile(wider, widths=(2, 3, 4, 5), seed=1))
    url = f"/v1/profiles/{key}"
    for allocation in ({}, {"method": "uniform", "embeddings": "quantize"}):
        found = allocate(http, url, budget={"code_bits": 3}, allocation=allocation).json()
        assert "model.embed_tokens" in found["map"]["linears"]
        assert found["code_bits"] <= 3
    refused = allocate(http, url, budget={"code_bits": 3}, allocation={"embeddings": "keep"})
    assert (refused.status_code, refused.json()["param"]) == (422, "allocation.embeddings")


def test_command_leaves_open_what_it_was_not_told(
    stack: Stack, url: str, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITMILL_URL", stack.url)
    line = ["map", "allocate", url.rpartition("/")[2], "--method", "uniform", "--json"]
    code, out, _ = command(*line, "--code-bits", "3")
    found = json.loads(out)
    assert (code, found["code_bits"], len(found["curve"])) == (0, 3.0, 32)
    code, _, err = command(*line)
    assert code == 2
    assert "exactly one of code_bits, bits, size" in err


def test_command_writes_its_map_over_a_map_alone(
    stack: Stack, url: str, command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BITMILL_URL", stack.url)
    target = tmp_path / "map.json"
    line = ["map", "allocate", url.rpartition("/")[2], "--code-bits", "3", "--out", str(target)]
    assert [command(*line)[0] for _ in range(2)] == [0, 0]
    assert json.loads(target.read_bytes())["linears"]
    target.write_text('{"mine": 1}')
    code, _, err = command(*line)
    assert (code, target.read_text()) == (2, '{"mine": 1}')
    assert "is not replaced" in err


def test_other_method_may_be_asked_for(http: httpx2.Client, url: str) -> None:
    allocation = {"method": "sba", "order": "natural", "widths": [2, 3, 4]}
    answer = allocate(http, url, budget={"code_bits": 3}, allocation=allocation)
    widths = {w for ws in answer.json()["map"]["linears"].values() for w in ws}
    assert widths <= set("234")


def test_impossible_budget_unknown_width_and_profile_are_refused(
    http: httpx2.Client, url: str
) -> None:
    low = allocate(http, url, budget={"code_bits": 1})
    assert (low.status_code, low.json()["code"]) == (422, "impossible_budget")
    allocation = {"method": "knapsack", "order": "natural", "widths": [2, 8]}
    unmeasured = allocate(http, url, budget={"code_bits": 3}, allocation=allocation)
    assert (unmeasured.status_code, unmeasured.json()["param"]) == (422, "allocation.widths")
    unknown = allocate(http, "/v1/profiles/none", budget={"code_bits": 3})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "profile_not_found")
    odd = allocate(http, url, budget={"code_bits": 3}, colour="red")
    assert (odd.status_code, odd.json()["param"]) == (422, "colour")
