"""Who may call what: keys and scopes over HTTP, on the command line and at the start."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bitmill.allocation.profiled import ProfiledModel
from bitmill.config.made_for import MadeFor
from bitmill.errors import InputError
from bitmill_service.client.client import Client
from bitmill_service.client.credentials import find_key, keep_key
from bitmill_service.client.errors import Unauthorized
from bitmill_service.embedded.server import EmbeddedService, ServeError
from bitmill_service.http.access import is_loopback
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.logs import AUDIT
from bitmill_workers.store.db import Database
from bitmill_workers.store.keys import KeyStore
from bitmill_workers.store.migrate import upgrade
from finished import Stack, spec_json
from plans import llama_plan, random_profile
from servers import free_port, listens
from serving import serve

PROBLEM = "application/problem+json"


@dataclass
class Guarded(Stack):
    """An API that asks for keys, with one key for each scope."""

    admin: str
    reader: str
    submitter: str

    def http(self, key: str | None) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Guarded]:
    settings = ServiceSettings(
        data=tmp_path_factory.mktemp("data"), model_roots={"models": models}, event_poll_s=0.05
    )
    app = create_app(settings)
    context = app.state.context
    upgrade(context.database)
    make = context.keys.store.create
    admin, _ = make("ops", scopes=["admin"])
    reader, _ = make("reader", scopes=["read"], tenant="team")
    submitter, _ = make("submitter", scopes=["submit"], tenant="team")
    with serve(app) as url:
        yield Guarded(url, context, admin, reader, submitter)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for credentials, and none in the environment."""
    monkeypatch.delenv("BITMILL_API_KEY", raising=False)
    monkeypatch.setenv("BITMILL_CREDENTIALS", str(tmp_path / "home" / "credentials.json"))
    return tmp_path / "home" / "credentials.json"


def operations(stack: Stack) -> list[tuple[str, str, list[str]]]:
    """Method, path and needed scopes of every operation that the description names."""
    described = httpx2.get(stack.url + "/openapi.json").json()
    assert described["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    found = []
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            needs = operation.get("security", [])
            scopes = [scope for need in needs for scope in need["key"]]
            if scopes:
                assert {"401", "403"} <= operation["responses"].keys(), (method, path)
            found.append((method.upper(), re.sub(r"\{\w+\}", "x", path), scopes))
    return found


def test_no_operation_is_reachable_without_its_scope(guarded: Guarded) -> None:
    keys = {"read": guarded.reader, "submit": guarded.submitter, "admin": guarded.admin}
    seen = set()
    with guarded.http(None) as http:
        for method, path, scopes in operations(guarded):
            told: dict[str | None, int] = {}
            for holder in (None, *keys):
                headers = {"Authorization": f"Bearer {keys[holder]}"} if holder else {}
                answer = http.request(method, path, headers=headers)
                told[holder] = answer.status_code
                if answer.status_code in (401, 403) and method != "HEAD":
                    assert answer.headers["content-type"] == PROBLEM
            if not scopes:
                assert path in ("/healthz", "/readyz"), path
                continue
            allowed = {"admin", *scopes}
            assert told[None] == 401, (method, path)
            for holder in keys:
                refused = told[holder] == 403
                assert refused is (holder not in allowed), (method, path, holder, told)
                assert told[holder] != 401
            seen |= set(scopes)
    assert seen == {"read", "submit", "admin"}


def test_routes_outside_the_description_need_a_key_as_well(guarded: Guarded) -> None:
    with guarded.http(None) as http:
        for path in ("/metrics", "/v1/jobs/x/events", "/nothing", "/v1/keys/", "//v1/keys"):
            headers = {"Accept": "text/event-stream"}
            assert http.get(path, headers=headers).status_code == 401, path
        assert {http.get(p).status_code for p in ("/docs", "/openapi.json", "/healthz")} == {200}
    with guarded.http(guarded.reader) as http:
        assert http.get("/metrics").status_code == 403
        assert http.get("/nothing").status_code == 404
    with guarded.http(guarded.admin) as http:
        assert http.get("/metrics").status_code == 200


def test_refusals_say_what_to_do_and_never_repeat_the_key(guarded: Guarded) -> None:
    wrong = guarded.admin[:-1] + ("0" if guarded.admin[-1] != "0" else "1")
    for given, code, status in (
        (None, "key_required", 401),
        (f"Bearer {wrong}", "key_refused", 401),
        ("Basic dXNlcjpwYXNz", "key_required", 401),
        ("Bearer hf_abcdefghijklmnopqrstuvwxyz", "hub_token_refused", 401),
    ):
        answer = httpx2.get(
            guarded.url + "/v1/jobs", headers={"Authorization": given} if given else {}
        )
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (status, code)
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.headers["x-error-message"] == problem["detail"]
        assert problem["request_id"] == answer.headers["x-request-id"]
        assert given is None or given.split()[1] not in answer.text + str(answer.headers)


def test_a_hub_token_is_refused_also_where_no_key_is_asked_for(stack: Stack) -> None:
    headers = {"Authorization": "Bearer hf_abcdefghijklmnopqrstuvwxyz"}
    answer = httpx2.get(stack.url + "/v1/jobs", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (401, "hub_token_refused")


def test_refused_body_is_not_read(guarded: Guarded) -> None:
    """A stranger's body is no work for the service; the refusal comes whatever is in it."""
    for body in (b"{", b"x" * (20 << 20)):
        answer = httpx2.post(guarded.url + "/v1/jobs", content=body, timeout=60)
        assert (answer.status_code, answer.json()["code"]) == (401, "key_required")


def test_tenants_see_their_own_jobs(guarded: Guarded) -> None:
    jobs = guarded.context.jobs
    theirs = guarded.succeeded()  # of the tenant "local"
    with guarded.http(guarded.submitter) as http:
        answer = http.post("/v1/jobs", json=spec_json())
        assert answer.status_code == 202
        mine = answer.json()["id"]
        assert jobs.get(mine).tenant == "team"
        for method, path in (
            ("POST", f"/v1/jobs/{theirs.id}/cancel"),
            ("POST", f"/v1/jobs/{theirs.id}/retry"),
            ("DELETE", f"/v1/jobs/{theirs.id}"),
        ):
            assert http.request(method, path).json()["code"] == "job_not_found"
        given = {"source": "job", "job_id": theirs.id}
        for change in (
            {"allocation": {"method": "map", "order": "natural", "map": given}},
            {"refinement": {"method": "omniquant", "omniquant": {"resume_parameters": given}}},
        ):
            refused = http.post("/v1/jobs", json=spec_json(**change))
            assert refused.status_code == 422
            assert refused.json()["code"] in ("map_not_found", "parameters_not_found")
    with guarded.http(guarded.reader) as http:
        assert [job["id"] for job in http.get("/v1/jobs").json()["jobs"]] == [mine]
        for part in ("", "/events", "/logs", "/files", "/files/model.safetensors", "/report"):
            assert http.get(f"/v1/jobs/{theirs.id}{part}").status_code == 404, part
        assert http.get(f"/v1/jobs/{mine}").status_code == 200
        first = http.get(f"/v1/jobs/{mine}/events").json()["events"][0]
        assert first["data"]["by"] == guarded.submitter.split("_")[1]
    with guarded.http(guarded.admin) as http:
        listed = {job["id"] for job in http.get("/v1/jobs").json()["jobs"]}
        assert {mine, theirs.id} <= listed
        assert http.get(f"/v1/jobs/{theirs.id}/files").status_code == 200


def test_maps_of_others_are_not_there(guarded: Guarded) -> None:
    with guarded.http(guarded.admin) as http:
        content = {"linears": {"a": "33"}}
        made = http.post("/v1/bit-width-maps", json=content).json()["id"]
    with guarded.http(guarded.reader) as http:
        assert http.get(f"/v1/bit-width-maps/{made}").status_code == 404
        assert http.get("/v1/bit-width-maps").json()["maps"] == []
    with guarded.http(guarded.submitter) as http:
        assert http.post("/v1/bit-width-maps", json=content).json()["id"] == made
    with guarded.http(guarded.reader) as http:
        assert http.get(f"/v1/bit-width-maps/{made}").status_code == 200


def two_tenants(guarded: Guarded) -> tuple[str, str]:
    """Keys of alice and bob, each of a tenant of its own."""
    make = guarded.context.keys.store.create
    alice, bob = (make(name, scopes=["read", "submit"])[0] for name in ("alice", "bob"))
    return alice, bob


def test_who_stores_the_same_map_reads_its_own_name(guarded: Guarded) -> None:
    content = {"linears": {"shared": "334"}}
    alice, bob = two_tenants(guarded)
    told = {}
    for key, params in ((alice, {"name": "secret label of alice"}), (bob, {})):
        with guarded.http(key) as http:
            told[key] = http.post("/v1/bit-width-maps", json=content, params=params).json()
    assert told[bob]["id"] == told[alice]["id"]
    assert (told[alice]["name"], told[bob]["name"]) == ("secret label of alice", None)
    assert (told[alice]["tenant"], told[bob]["tenant"]) == ("alice", "bob")
    assert told[bob]["created_at"] > told[alice]["created_at"]
    with guarded.http(bob) as http:
        named = http.post("/v1/bit-width-maps", json=content, params={"name": "of bob"}).json()
        assert named == told[bob] | {"name": "of bob"}
        assert http.get("/v1/bit-width-maps").json()["maps"] == [named]
        assert "Tenant" not in http.get("/ui/bit-width-maps").text
    with guarded.http(alice) as http:
        assert http.get("/v1/bit-width-maps").json()["maps"] == [told[alice]]
    with guarded.http(guarded.admin) as http:
        maps = http.get("/v1/bit-width-maps").json()["maps"]
        assert [one for one in maps if one["id"] == named["id"]] == [told[alice]]
        page = http.get("/ui/bit-width-maps").text
        assert "<td>alice</td><td>secret label of alice</td>" in page
    with guarded.http(alice) as http:
        assert http.delete(f"/v1/bit-width-maps/{named['id']}").status_code == 204
    with guarded.http(guarded.admin) as http:
        maps = http.get("/v1/bit-width-maps").json()["maps"]
        assert [one for one in maps if one["id"] == named["id"]] == [named]


def test_who_makes_the_same_profile_reads_its_own_words(guarded: Guarded) -> None:
    plan = llama_plan(blocks=1)
    profile = random_profile(plan, widths=(2, 3, 4))
    folder = guarded.context.settings.profiles_folder / profile.key
    made_for = MadeFor(shape="a" * 64, weights="b" * 64, model="alice/secret")
    ProfiledModel(profile, plan, made_for).save(folder)
    add = guarded.context.catalog.add_profile
    for tenant, model in (("alice", "alice/secret"), ("bob", "bob/own")):
        add(profile.key, model=model, settings={"model": model}, path=profile.key, tenant=tenant)
    for key, model in zip(two_tenants(guarded), ("alice/secret", "bob/own"), strict=True):
        with guarded.http(key) as http:
            one = http.get(f"/v1/profiles/{profile.key}").json()
            assert (one["model"], one["settings"]) == (model, {"model": model})
            (listed,) = http.get("/v1/profiles").json()["profiles"]
            assert (listed["model"], listed["settings"]) == (model, {"model": model})
            body = {"budget": {"code_bits": 3}}
            made = http.post(f"/v1/profiles/{profile.key}/allocate", json=body).json()["map"]
            assert made["made_for"] == made_for.model_dump() | {"model": model}
            page = http.get(f"/ui/profiles/{profile.key}").text
            assert model in page
    with guarded.http(guarded.admin) as http:
        (listed,) = http.get("/v1/profiles").json()["profiles"]
        assert (listed["tenant"], listed["model"]) == ("alice", "alice/secret")
        assert "<td>alice</td><td>alice/secret</td>" in http.get("/ui/profiles").text


def test_the_same_idempotency_key_of_two_tenants_makes_two_jobs(guarded: Guarded) -> None:
    made = set()
    for key in (guarded.admin, guarded.submitter):
        with guarded.http(key) as http:
            answer = http.post("/v1/jobs", json=spec_json(), headers={"Idempotency-Key": "one"})
            made.add(answer.json()["id"])
            again = http.post("/v1/jobs", json=spec_json(), headers={"Idempotency-Key": "one"})
            assert again.headers["idempotency-replayed"] == "true"
    assert len(made) == 2


def test_keys_are_made_shown_once_and_revoked_over_http(guarded: Guarded) -> None:
    with guarded.http(guarded.admin) as http:
        answer = http.post("/v1/keys", json={"name": "eve", "scopes": ["read"]})
        assert answer.status_code == 201
        assert answer.headers["cache-control"] == "no-store"
        key, key_id = answer.json()["key"], answer.json()["id"]
        listed = http.get("/v1/keys").text
        assert key_id in listed
        assert key not in listed
        assert httpx2.get(
            guarded.url + "/v1/jobs", headers={"Authorization": f"Bearer {key}"}
        ).is_success
        assert http.delete(f"/v1/keys/{key_id}").status_code == 204
        assert http.delete(f"/v1/keys/{key_id}").status_code == 204
        assert http.delete("/v1/keys/nobody00").json()["code"] == "key_not_found"
        for wrong in ({"name": "a b"}, {"name": "a", "scopes": []}, {"name": "a", "more": 1}):
            assert http.post("/v1/keys", json=wrong).status_code == 422
    gone = httpx2.get(guarded.url + "/v1/jobs", headers={"Authorization": f"Bearer {key}"})
    assert gone.json()["code"] == "key_refused"


def test_changes_are_in_the_audit_log_with_who_made_them(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, AUDIT)
    with guarded.http(guarded.submitter) as http:
        job = http.post("/v1/jobs", json=spec_json()).json()["id"]
        http.get(f"/v1/jobs/{job}")
        http.post(f"/v1/jobs/{job}/cancel")
        http.post("/v1/jobs/none/cancel")
    lines = [r.getMessage() for r in caplog.records if r.name == AUDIT]
    assert lines == ["POST /v1/jobs 202", f"POST /v1/jobs/{job}/cancel 200"]


@pytest.mark.parametrize(
    ("host", "yes"),
    [
        *(("127.0.0.1", 1), ("127.8.8.8", 1), ("::1", 1), ("localhost", 1), ("0.0.0.0", 0)),
        *(("::", 0), ("10.0.0.1", 0), ("bitmill.example", 0), ("127.0.0.1.example", 0)),
    ],
)
def test_loopback_is_known(host: str, yes: int) -> None:
    assert is_loopback(host) is bool(yes)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_no_other_address_is_served_without_a_key(tmp_path: Path, host: str) -> None:
    settings = ServiceSettings(data=tmp_path, host=host, port=0)
    with pytest.raises(ServeError, match="there is no API key") as refused:
        EmbeddedService(settings, worker=False).prepare()
    assert refused.value.code == "no_key"
    database = Database(settings.database)
    key, record = KeyStore(database).create("ops", scopes=["admin"])
    with EmbeddedService(settings, worker=False) as service:
        assert httpx2.get(service.url + "/v1/jobs").status_code == 401
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx2.get(service.url + "/v1/jobs", headers=headers).status_code == 200
    KeyStore(database).revoke(record.id)
    database.close()
    with pytest.raises(ServeError, match="there is no API key"):
        EmbeddedService(settings, worker=False).prepare()
    open_to_all = settings.model_copy(update={"keys": "off"})
    with EmbeddedService(open_to_all, worker=False) as service:
        assert httpx2.get(service.url + "/v1/jobs").status_code == 200


def test_loopback_asks_for_a_key_once_one_was_made(tmp_path: Path) -> None:
    with (
        EmbeddedService(ServiceSettings(data=tmp_path, port=0), worker=False) as service,
        httpx2.Client(base_url=service.url, timeout=60) as http,
    ):
        assert http.get("/v1/jobs").status_code == 200
        made = http.post("/v1/keys", json={"name": "ops", "scopes": ["admin"]}).json()
        assert http.get("/v1/jobs").status_code == 401
        http.headers["Authorization"] = f"Bearer {made['key']}"
        assert http.delete(f"/v1/keys/{made['id']}").status_code == 204
        assert http.get("/v1/jobs").status_code == 401  # the last key is gone: still closed


def test_command_line_makes_lists_and_revokes_keys(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    data = ("--data", tmp_path / "new")
    code, out, err = command("keys", "create", "alice", "--days", "2", "--bytes", "1GB", *data)
    key = out.strip()
    assert (code, key[:3]) == (0, "bm_")
    assert "shown once" in err
    assert str(tmp_path / "new") in err
    listed = json.loads(command("keys", "list", *data, "--json")[1])
    assert [k["name"] for k in listed] == ["alice"]
    assert listed[0]["limits"]["bytes"] == 10**9
    assert key not in str(listed)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert "live" in command("keys", "list", *data)[1]
    assert command("keys", "revoke", listed[0]["id"], *data)[0] == 0
    assert "revoked" in command("keys", "list", *data)[1]
    code, _, err = command("keys", "create", "a b", *data)
    assert (code, "name" in err) == (2, True)
    assert command("keys", "revoke", "nobody00", *data)[0] == 2


@pytest.mark.parametrize(
    "line", [("keys", "list"), ("keys", "revoke", "3fQ9aZ01"), ("prune",), ("backup", "{}/b")]
)
def test_a_data_folder_that_is_none_is_refused_and_not_made(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, line: tuple[str, ...]
) -> None:
    words = [word.format(tmp_path) for word in line]
    code, out, err = command(*words, "--data", tmp_path / "mistyped")
    assert (code, out) == (2, "")
    assert f"{tmp_path}/mistyped is no data folder" in err
    assert list(tmp_path.iterdir()) == []


def test_command_line_asks_a_service_about_keys(
    command: Callable[..., tuple[int, str, str]],
    guarded: Guarded,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, _, err = command("list", "--url", guarded.url)
    assert code == 6
    assert "bitmill login" in err
    monkeypatch.setenv("BITMILL_API_KEY", guarded.admin)
    made = json.loads(command("keys", "create", "carl", "--url", guarded.url, "--json")[1])
    assert made["created_by"] == guarded.admin.split("_")[1]
    assert made["id"] in command("keys", "list", "--url", guarded.url)[1]
    assert command("keys", "revoke", made["id"], "--url", guarded.url)[0] == 0


def test_login_keeps_a_key_that_works_where_nobody_else_reads_it(
    command: Callable[..., tuple[int, str, str]],
    guarded: Guarded,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BITMILL_API_KEY", guarded.reader[:-1])
    assert command("login", "--url", guarded.url)[0] == 6
    assert not home.exists()
    monkeypatch.setenv("BITMILL_API_KEY", guarded.reader)
    code, out, _ = command("login", "--url", guarded.url + "/")
    assert code == 0
    assert guarded.reader not in out
    assert stat.S_IMODE(home.stat().st_mode) == 0o600
    monkeypatch.delenv("BITMILL_API_KEY")
    assert command("list", "--url", guarded.url)[0] == 0
    with Client(guarded.url) as client:
        assert client.list_jobs().jobs is not None
    assert find_key("http://elsewhere.example") is None  # no other service is shown the key
    assert command("logout", "--url", guarded.url)[0] == 0
    with Client(guarded.url) as client, pytest.raises(Unauthorized, match="needs an API key"):
        client.list_jobs()


@pytest.mark.parametrize("key", ["bm_secret\nword", "bm_secretclé"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(
    command: Callable[..., tuple[int, str, str]], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITMILL_API_KEY", key)
    for line in (("list",), ("login",)):
        code, out, err = command(*line, "--url", "http://127.0.0.1:9")
        assert (code, out) == (2, "")
        assert f"the API key of {len(key)} characters cannot be sent" in err
        assert "secret" not in err


def test_login_without_an_answer_says_so(home: Path) -> None:
    words = [sys.executable, "-P", "-m", "bitmill_service.cli.main", "login"]
    unset = {name: text for name, text in os.environ.items() if name != "BITMILL_API_KEY"}
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=unset,
        check=False,
        start_new_session=True,
    )
    assert done.returncode == 2
    assert "no API key was given" in done.stderr
    assert "Traceback" not in done.stderr
    assert not home.exists()


def test_exposed_or_damaged_credentials_are_refused(home: Path) -> None:
    keep_key("http://one.example", "bm_x")
    assert find_key("http://one.example") == "bm_x"
    os.chmod(home, 0o644)
    with pytest.raises(InputError, match="chmod 600"):
        find_key("http://one.example")
    os.chmod(home, 0o600)
    for damaged in ("", "[]", '{"keys": 1}', "{"):
        home.write_text(damaged)
        with pytest.raises(InputError, match="bitmill login"):
            find_key("http://one.example")


def test_a_key_without_leave_does_not_spend_the_operators_hub_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is a server that writes down who asks with which token."""
    asked: list[str | None] = []

    async def hub(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        asked.append(dict(scope["headers"]).get(b"authorization", b"").decode() or None)
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    with serve(hub) as endpoint:
        settings = ServiceSettings(data=tmp_path, hub_endpoint=endpoint, hub_token="hf_operator")  # type: ignore[arg-type]
        app = create_app(settings)
        upgrade(app.state.context.database)
        make = app.state.context.keys.store.create
        ops, _ = make("ops", scopes=["admin"])
        limits = {"hub_repositories": ["org/*"]}
        with serve(app) as url, httpx2.Client(base_url=url, timeout=30) as http:
            http.headers["Authorization"] = f"Bearer {ops}"
            body = {"name": "a", "limits": limits}
            allowed = http.post("/v1/keys", json=body).json()["key"]
            told = {}
            for key, repo in ((ops, "any/x"), (allowed, "org/x"), (allowed, "other/x")):
                asked.clear()
                model = {"source": "hub", "repo_id": repo}
                http.post(
                    "/v1/jobs?validate_only=true",
                    json=spec_json(model=model),
                    headers={"Authorization": f"Bearer {key}"},
                )
                told[(key == ops, repo)] = set(asked)
    assert told == {
        (True, "any/x"): {"Bearer hf_operator"},
        (False, "org/x"): {"Bearer hf_operator"},
        (False, "other/x"): {None},
    }


def test_metrics_have_a_port_of_their_own_without_a_key(tmp_path: Path) -> None:
    port = free_port()
    settings = ServiceSettings(data=tmp_path, keys="required", metrics_port=port)
    app = create_app(settings)
    upgrade(app.state.context.database)
    with serve(app) as url:
        assert httpx2.get(f"{url}/metrics").status_code == 401
        told = httpx2.get(f"http://127.0.0.1:{port}/metrics").text
        assert "bitmill_jobs{" in told
        assert "bitmill_database_up 1.0" in told
        with app.state.context.database.write() as conn:
            conn.exec_driver_sql("ALTER TABLE workers RENAME TO gone")
        answer = httpx2.get(f"http://127.0.0.1:{port}/metrics")
        assert answer.status_code == 200
        assert "bitmill_database_up 0.0" in answer.text
        assert "bitmill_jobs" not in answer.text
        assert "bitmill_disk_free_bytes" in answer.text
        assert 'bitmill_http_request_seconds_count{method="GET"' in answer.text
    assert not listens(port)
