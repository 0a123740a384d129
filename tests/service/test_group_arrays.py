"""Groups as typed arrays, read with the safetensors library and held against the other routes."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load

from bitmill.allocation.allocator import Allocator, allocate
from bitmill.allocation.profile import SensitivityProfile
from bitmill.config.bit_width_map import BitWidthMap, group_bytes
from bitmill.config.quantization import Allocation, Budget, QuantizationConfig
from bitmill.plan.model_plan import Plan
from bitmill.reporting.summary import SUMMARY_NAME, ProfileSummary, summarize
from bitmill.results import LinearResult, QualityReport
from bitmill_workers.store.records import JobRecord
from finished import Stack
from plans import llama_plan, random_profile

ALLOCATION = Allocation(widths=(2, 3, 4, 5), order="natural")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return llama_plan(blocks=2)


@pytest.fixture(scope="module")
def profile(plan: Plan) -> SensitivityProfile:
    return random_profile(plan, widths=(2, 3, 4, 5))


@pytest.fixture(scope="module")
def made(plan: Plan, profile: SensitivityProfile) -> BitWidthMap:
    config = QuantizationConfig(budget=Budget(code_bits=3.2), allocation=ALLOCATION)
    return allocate(plan, config, profile)


@pytest.fixture(scope="module")
def summary(plan: Plan, profile: SensitivityProfile, made: BitWidthMap) -> ProfileSummary:
    found = summarize(plan, ALLOCATION, profile, made)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def stored(stack: Stack, plan: Plan, profile: SensitivityProfile) -> str:
    return stack.profile(plan, profile)


@pytest.fixture(scope="module")
def job(
    stack: Stack, plan: Plan, made: BitWidthMap, summary: ProfileSummary, stored: str
) -> JobRecord:
    errors = (
        LinearResult(name=shape.name, code_bits=3, relative_error=0.01 * place)
        for place, shape in enumerate(plan.shapes[:-1])
    )
    report = QualityReport(rows=(), linears=tuple(errors))
    files = {
        "bit_width_map.json": made.to_json(),
        "quality.json": report.to_json(),
        SUMMARY_NAME: summary.to_json(),
    }
    return stack.finish(stack.running(), others=files, profile=stored)


def arrays(answer: httpx2.Response) -> dict[str, npt.NDArray[Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/octet-stream"
    return load(answer.content)


def test_groups_of_a_job_are_those_of_its_files(
    http: httpx2.Client, job: JobRecord, plan: Plan, made: BitWidthMap, summary: ProfileSummary
) -> None:
    found = arrays(http.get(f"/v1/jobs/{job.id}/groups"))
    names, starts = json.loads(found["names"].tobytes()), found["starts"]
    assert names == list(made.linears)
    assert (starts[-1], len(starts)) == (len(found["widths"]), len(names) + 1)
    shapes = {shape.name: shape for shape in plan.shapes}
    for place, name in enumerate(names):
        part = slice(starts[place], starts[place + 1])
        shape, widths = shapes[name], made.linears[name]
        assert tuple(found["widths"][part]) == widths
        assert tuple(found["shapes"][place]) == (shape.rows, shape.columns)
        tail = shape.columns % 128
        columns = [128] * (shape.columns // 128) + [tail] * bool(tail)
        expected = [group_bytes(w, shape.rows, c) for w, c in zip(widths, columns, strict=True)]
        assert found["bytes"][part].tolist() == expected
        costs = np.array(summary.linears[name].groups, dtype=np.float32)
        assert np.array_equal(found["sensitivity"][part], costs)
        assert found["predicted_loss"][place] == np.float32(summary.linears[name].predicted_loss)
    assert found["reference_width"].tolist() == [summary.reference_width]
    assert found["error"][:3].tolist() == pytest.approx([0, 0.01, 0.02])
    assert np.isnan(found["error"][-1])


def test_what_a_job_did_not_measure_is_absent(http: httpx2.Client, stack: Stack) -> None:
    found = arrays(http.get(f"/v1/jobs/{stack.succeeded().id}/groups"))
    assert set(found) == {"names", "starts", "widths"}
    assert found["widths"].tolist() == [3, 3, 2, 4]


def test_groups_of_an_unfinished_job_are_refused(http: httpx2.Client, stack: Stack) -> None:
    answer = http.get(f"/v1/jobs/{stack.queued().id}/groups")
    assert (answer.status_code, answer.json()["code"]) == (409, "job_not_finished")


def test_maps_of_a_profile_are_those_of_its_curve(
    http: httpx2.Client, stored: str, plan: Plan, profile: SensitivityProfile
) -> None:
    url = f"/v1/profiles/{stored}"
    found = arrays(http.get(f"{url}/maps", params={"points": 9}))
    curve = http.post(f"{url}/allocate", json={"budget": {"bits": 3.4}}).json()["curve"]
    assert (found["size"][0], found["size"][-1]) == (curve[0]["size"], curve[-1]["size"])
    names, starts = json.loads(found["names"].tobytes()), found["starts"]
    assert len(found["widths"]) == len(found["size"]) <= 9
    for widths, loss in zip(found["widths"], found["predicted_loss"], strict=True):
        linears = {
            name: tuple(widths[starts[i] : starts[i + 1]].tolist()) for i, name in enumerate(names)
        }
        assert profile.predicted_loss(linears) == pytest.approx(loss)
    assert found["costs"].shape == found["bytes_at"].shape == (starts[-1], 4)
    by_group = found["bytes_at"][np.arange(starts[-1]), found["widths"][0] - 2]
    assert 8 * by_group.sum() / plan.weights == pytest.approx(found["bits"][0])


def test_uniform_maps_are_marked(
    http: httpx2.Client, stored: str, plan: Plan, profile: SensitivityProfile
) -> None:
    found = arrays(http.get(f"/v1/profiles/{stored}/maps"))
    assert found["uniform_widths"].tolist() == [2, 3, 4, 5]
    three = Allocator(plan, ALLOCATION, profile)
    point = three.point(three.groups.uniform(3))
    at = found["uniform_size"][1], found["uniform_predicted_loss"][1]
    assert at == (point.size, pytest.approx(point.predicted_loss))


def test_a_profile_without_costs_and_one_that_is_not_there_are_refused(
    http: httpx2.Client, stack: Stack
) -> None:
    other = llama_plan(blocks=1)
    bare = random_profile(other, widths=(), seed=7, sba=(3,))
    key = stack.profile(other, bare)
    assert http.get(f"/v1/profiles/{key}/maps").json()["code"] == "invalid_spec"
    assert http.get("/v1/profiles/none/maps").json()["code"] == "profile_not_found"


def test_jobs_of_a_profile_are_listed(
    http: httpx2.Client, stack: Stack, job: JobRecord, stored: str
) -> None:
    stack.succeeded()
    listed = http.get("/v1/jobs", params={"profile": stored}).json()["jobs"]
    assert [one["id"] for one in listed] == [job.id]
