"""Uploading bit-width maps: this project's JSON, and a torch file that is never executed."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Budget, QuantizationConfig
from bitmill.plan.fingerprint import Fingerprint
from bitmill.plan.model_plan import plan_source
from bitmill.plan.source_model import read_source
from bitmill_service.client.client import Client
from finished import MAP, Stack, spec_json
from hub_server import hub_app
from serving import serve

Command = Callable[..., tuple[int, str, str]]


def upload(http: httpx2.Client, content: bytes, **query: str) -> httpx2.Response:
    return http.post("/v1/bit-width-maps", content=content, params=query)


def torch_file(pickled: bytes) -> bytes:
    """What `torch.save` writes, as far as readers look at it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def test_json_map_is_stored_once_under_its_content(http: httpx2.Client) -> None:
    answer = http.post("/v1/bit-width-maps", json=MAP, params={"name": "mine"})
    assert answer.status_code == 201
    stored = answer.json()
    assert stored["histogram"] == {"2": 1, "3": 2, "4": 1}
    assert (stored["linears"], stored["groups"], stored["name"]) == (2, 4, "mine")
    assert http.post("/v1/bit-width-maps", json=MAP).json()["id"] == stored["id"]
    assert [m["id"] for m in http.get("/v1/bit-width-maps").json()["maps"]].count(stored["id"]) == 1
    assert http.get(f"/v1/bit-width-maps/{stored['id']}").json() == MAP


def test_the_same_widths_for_another_model_are_another_map(http: httpx2.Client) -> None:
    content = MAP | {"linears": {"model.layers.0.mlp.up_proj": "43"}}
    base = {"shape": "d" * 64, "weights": "e" * 64, "model": "org/base"}
    tuned = base | {"weights": "f" * 64, "model": "org/tuned"}
    given = (
        content,
        *(content | {"made_for": made} for made in (base, tuned, {"model": "org/named"})),
    )
    ids = [http.post("/v1/bit-width-maps", json=one).json()["id"] for one in given]
    assert len(set(ids)) == len(given)
    for map_id, one in zip(ids, given, strict=True):
        told = http.get(f"/v1/bit-width-maps/{map_id}").json()
        assert BitWidthMap.model_validate(told).made_for == BitWidthMap.model_validate(one).made_for
        again = http.post("/v1/bit-width-maps", json=one).json()
        made = one.get("made_for", {})
        assert (again["id"], again["name"]) == (map_id, made.get("model"))
        assert (again["shape"], again["weights"]) == (made.get("shape"), made.get("weights"))
    for weights, found in (("e", ids[1]), ("f", ids[2])):
        listed = http.get("/v1/bit-width-maps", params={"model": weights * 64}).json()["maps"]
        assert [one["id"] for one in listed] == [found]
    body = json.dumps(given[1]).encode()
    same = upload(http, body, shape="d" * 64, weights="e" * 64).json()
    other = upload(http, body, shape="d" * 64).json()
    assert same["id"] == ids[1]
    assert other["id"] not in ids
    assert (other["shape"], other["weights"]) == ("d" * 64, None)


def test_published_slim_llm_file_becomes_a_map(http: httpx2.Client) -> None:
    layers = {0: {"self_attn.q_proj": [2, 3, 4]}, 1: {"self_attn.q_proj": [3, 3, 3]}}
    answer = upload(http, torch_file(pickle.dumps(layers, protocol=2)))
    found = http.get(f"/v1/bit-width-maps/{answer.json()['id']}").json()["linears"]
    assert found == {
        "model.layers.0.self_attn.q_proj": "234",
        "model.layers.1.self_attn.q_proj": "333",
    }


class Evil:
    """Would create a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.target), "w"))


def test_pickle_that_runs_code_is_refused_and_not_run(http: httpx2.Client, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    for content in (
        torch_file(pickle.dumps({0: Evil(target)}, protocol=2)),
        pickle.dumps(Evil(target)),
    ):
        answer = upload(http, content)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_format")
    assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [
        b'{"linears": {"a": "39"}}',
        b'{"linears": {"a": ""}}',
        b'{"linears": {"a": "3"}, "colour": 1}',
        b'{"linears": {}}',
        b"{",
        b"",
        b"\x80\x04garbage",
    ],
)
def test_what_is_no_map_is_refused(http: httpx2.Client, content: bytes) -> None:
    answer = upload(http, content)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_format")


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "is empty"), (b"[]", "is JSON, but no object"), (b"null", "is JSON, but no object")],
)
def test_what_is_json_is_not_told_as_a_damaged_pickle(
    http: httpx2.Client, content: bytes, told: str
) -> None:
    answer = upload(http, content)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_format")
    assert told in answer.json()["detail"]


def test_job_may_name_a_stored_map_and_must_name_one_that_fits(http: httpx2.Client) -> None:
    map_id = http.post("/v1/bit-width-maps", json=MAP).json()["id"]
    allocation = {"method": "map", "order": "natural", "map": {"source": "upload"}}
    allocation["map"] = {"source": "upload", "map_id": map_id}
    unfit = http.post("/v1/jobs", json=spec_json(allocation=allocation))
    assert (unfit.status_code, unfit.json()["code"]) == (422, "invalid_format")
    allocation["map"] = {"source": "upload", "map_id": "none"}
    missing = http.post("/v1/jobs", json=spec_json(allocation=allocation))
    assert (missing.status_code, missing.json()["code"]) == (422, "map_not_found")
    assert missing.json()["param"] == "allocation.map.map_id"


def test_maps_are_found_by_the_model_that_they_are_of(http: httpx2.Client) -> None:
    shape, weights, other = ("a" * 64, "b" * 64, "c" * 64)
    mine = {**MAP, "linears": {"model.layers.0.mlp.up_proj": "55"}}
    stored = http.post(
        "/v1/bit-width-maps", json=mine, params={"shape": shape, "weights": weights}
    ).json()
    assert (stored["shape"], stored["weights"]) == (shape, weights)
    for model, found in ((shape, [stored["id"]]), (weights, [stored["id"]]), (other, [])):
        maps = http.get("/v1/bit-width-maps", params={"model": model}).json()["maps"]
        assert [one["id"] for one in maps] == found
    assert stored["id"] in [one["id"] for one in http.get("/v1/bit-width-maps").json()["maps"]]
    half = http.post("/v1/bit-width-maps", json=mine, params={"weights": weights})
    assert (half.status_code, half.json()["param"]) == (422, "shape")
    odd = http.get("/v1/bit-width-maps", params={"model": "A"})
    assert (odd.status_code, odd.json()["code"]) == (422, "invalid_request")


def test_the_command_finds_maps_of_the_service_and_of_a_folder(
    stack: Stack, client: Client, models: Path, tmp_path: Path, command: Command
) -> None:
    plan = plan_source(read_source(models / "tiny"), QuantizationConfig(budget=Budget(bits=8)))
    content = BitWidthMap.uniform(plan.shapes, 3).to_json()
    own = Fingerprint.of_folder(models / "tiny", weights=True)
    stored = client.upload_map(content.encode(), model=own)
    asked = ("map", "find", models / "tiny", "--url", stack.url, "--json")
    for more, match in (((), "shape"), (("--weights",), "weights")):
        code, out, err = command(*asked, *more)
        assert code == 0, err
        (found,) = json.loads(out)["maps"]
        assert (found["file"], found["match"], found["bits"]) == (f"upload:{stored.id}", match, 3)
    (tmp_path / "a.json").write_text(content)
    code, out, err = command("map", "find", models / "tiny", "--from", tmp_path)
    assert code == 0, err
    assert "fits" in out
    assert "a.json" in out
    nowhere = tmp_path / "nowhere"
    for wrong in ((models / "tiny", "--from", nowhere), (nowhere, "--from", tmp_path)):
        code, out, err = command("map", "find", *wrong)
        assert code == 2
        assert f"there is no folder {nowhere}" in err
    code, out, err = command("map", "show", models / "tiny")
    assert code == 2
    assert "holds no bit_width_map.json" in err


def test_maps_that_fit_are_found_beside_others_of_the_same_shape(
    stack: Stack, client: Client, models: Path, command: Command
) -> None:
    plan = plan_source(read_source(models / "tiny"), QuantizationConfig(budget=Budget(bits=8)))
    own = Fingerprint.of_folder(models / "tiny")
    linears = BitWidthMap.uniform(plan.shapes, 2).linears
    embedding = {"model.embed_tokens": (8,) * len(linears["model.layers.0.self_attn.q_proj"])}
    contents = {
        "embedding": {**linears, **embedding},
        "unfit": {"model.layers.0.mlp.up_proj": (5,) * 99},
    }
    ids = {
        name: client.upload_map(BitWidthMap(linears=given).to_json().encode(), model=own).id
        for name, given in contents.items()
    }
    code, out, err = command("map", "find", models / "tiny", "--url", stack.url, "--json")
    assert code == 0, err
    found = [one["file"] for one in json.loads(out)["maps"]]
    assert f"upload:{ids['embedding']}" in found
    assert f"upload:{ids['unfit']}" not in found


def test_the_command_finds_maps_of_a_hub_repository_for_a_model_on_the_hub(
    models: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models / "tiny", tmp_path / "hub/org/model")
    zoo = tmp_path / "hub/org/zoo"
    zoo.mkdir()
    plan = plan_source(read_source(models / "tiny"), QuantizationConfig(budget=Budget(bits=8)))
    (zoo / "a.json").write_text(BitWidthMap.uniform(plan.shapes, 3).to_json())
    own = Fingerprint.of_folder(models / "tiny").model_dump()
    (zoo / "zoo.json").write_text(json.dumps({"maps": {"a.json": own}}))
    (zoo / "code.py").write_text("raise SystemExit")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve(hub_app(tmp_path / "hub")) as url:
        monkeypatch.setenv("BITMILL_HUB_ENDPOINT", url)
        code, out, err = command("map", "find", "org/model", "--from", "org/zoo", "--json")
        assert code == 0, err
        (found,) = json.loads(out)["maps"]
        assert (found["from"], found["file"], found["match"]) == ("org/zoo", "a.json", "shape")
        assert not list((tmp_path / "cache").rglob("*.py"))
        code, out, err = command("map", "find", "org/model", "--from", "org/none")
    assert code == 2
    assert "org/none@main does not exist, or is private" in err
