"""The description holds what the API does: references, answers, types."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2
import pytest

from bitmill.config.quantization import Budget
from finished import Stack, spec_json


@pytest.fixture(scope="module")
def described(http: httpx2.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/openapi.json").json()
    return found


def test_every_reference_leads_somewhere(described: dict[str, Any]) -> None:
    used = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(described)))
    assert used - described["components"]["schemas"].keys() == set()
    assert {"BitWidthMap", "Problem", "JobSpec"} <= used
    assert "HTTPValidationError" not in described["components"]["schemas"]


def test_every_answer_is_named_by_its_status(described: dict[str, Any]) -> None:
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            statuses = set(operation["responses"])
            assert all(status.isdecimal() for status in statuses), (method, path)
            assert {"400", "421", "422", "500", "503"} <= statuses, (method, path)
            if method in ("post", "delete"):
                assert "403" in statuses
            if "requestBody" in operation:
                assert "413" in statuses
            for status, answer in operation["responses"].items():
                if status >= "400" and path != "/readyz":
                    assert list(answer["content"]) == ["application/problem+json"]


def test_patterns_mean_the_same_in_every_language(described: dict[str, Any]) -> None:
    """\\w takes letters of all alphabets in some and of one in others."""
    patterns = re.findall(r'"pattern": "([^"]+)"', json.dumps(described))
    assert len(patterns) > 5
    assert [pattern for pattern in patterns if r"\w" in pattern] == []


@pytest.mark.parametrize(
    ("budget", "legal"),
    [
        ({"bits": 3}, True),
        ({"size": 10, "bits": None}, True),
        ({}, False),
        ({"bits": None}, False),
        ({"bits": 3, "code_bits": 3}, False),
    ],
)
def test_exactly_one_budget_is_in_the_schema(
    described: dict[str, Any], budget: dict[str, Any], legal: bool
) -> None:
    schema = described["components"]["schemas"]["Budget"]
    matching = [
        rule
        for rule in schema["oneOf"]
        if all(budget.get(name) is not None for name in rule["required"])
    ]
    assert {name for rule in schema["oneOf"] for name in rule["required"]} == set(
        Budget.model_fields
    )
    assert (len(matching) == 1) is legal


def test_a_choice_needs_its_discriminator_in_schema_and_service(
    described: dict[str, Any], http: httpx2.Client
) -> None:
    for name in ("HubModel", "PathModel", "FileText", "InlineMap", "JobParameters"):
        assert "source" in described["components"]["schemas"][name]["required"], name
    answer = http.post("/v1/jobs", json=spec_json(model={"path": "models/tiny"}))
    assert answer.status_code == 422


def test_maps_fit_their_description(
    described: dict[str, Any], http: httpx2.Client, stack: Stack
) -> None:
    schema = described["components"]["schemas"]["BitWidthMap"]["properties"]["linears"]
    kinds = {kind["type"]: kind for kind in schema["additionalProperties"]["anyOf"]}
    found = http.get(f"/v1/jobs/{stack.succeeded().id}/bit-width-map").json()["linears"]
    assert found
    for widths in found.values():
        assert re.search(kinds["string"]["pattern"], widths)
    listed = {"linears": {name: [int(w) for w in widths] for name, widths in found.items()}}
    assert http.post("/v1/bit-width-maps", json=listed).status_code == 201
    assert kinds["array"]["items"] == {"type": "integer"}


def test_documented_answers_of_files_are_those_given(
    described: dict[str, Any], http: httpx2.Client, stack: Stack
) -> None:
    documented = described["paths"]["/v1/jobs/{job_id}/files/{path}"]
    job = stack.succeeded().id
    asked: list[tuple[str, str, dict[str, str]]] = [
        ("GET", "model.safetensors", {}),
        ("HEAD", "model.safetensors", {}),
        ("GET", "quality.json", {}),
        ("GET", "SHA256SUMS", {}),
        ("GET", "model.safetensors", {"Range": "bytes=0-9"}),
        ("GET", "model.safetensors", {"Range": "bytes=99999999-"}),
        ("GET", "model.safetensors", {"Range": "bytes=99999999999999999999999-"}),
        ("GET", "model.safetensors", {"If-None-Match": "*"}),
        ("HEAD", "model.safetensors", {"If-None-Match": "*"}),
        ("GET", "model.safetensors", {"If-Match": '"x"'}),
        ("GET", "none", {}),
    ]
    seen = set()
    for method, path, headers in asked:
        answer = http.request(method, f"/v1/jobs/{job}/files/{path}", headers=headers)
        told = documented[method.lower()]["responses"][str(answer.status_code)]
        if answer.status_code != 304:
            assert answer.headers["content-type"] in told["content"]
        seen.add(answer.status_code)
    assert seen == {200, 206, 304, 404, 412, 416}


def test_the_page_for_people_holds_everything_and_asks_nobody_else(
    described: dict[str, Any], http: httpx2.Client
) -> None:
    answer = http.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = answer.text
    for path, methods in described["paths"].items():
        for method in methods:
            assert f"{method.upper()} {path}<" in page
    for name in described["components"]["schemas"]:
        assert f'id="{name}"' in page
    anchors = set(re.findall(r'href="([^"]+)"', page))
    assert {a for a in anchors if not a.startswith("#")} == {"openapi.json"}
    assert {a[1:] for a in anchors if a.startswith("#")} <= described["components"][
        "schemas"
    ].keys()
    assert re.findall(r"<script|src=|@import|url\(", page) == []
    assert http.get("/redoc").status_code == 404
