"""Web pages as any HTTP client gets them, without a script: what they show, to whom, and how."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Iterator

import httpx2
import pytest

from bitmill.errors import ModelError
from bitmill_service.main import create_app
from bitmill_service.pages.static_files import FOREVER
from bitmill_service.pages.submission import DEFAULTS, specification
from bitmill_service.settings import ServiceSettings
from bitmill_workers.job_spec import ExportSpec, PathModel, parse_spec
from bitmill_workers.store.keys import KeyStore
from bitmill_workers.store.migrate import upgrade
from finished import MAP, Stack
from serving import serve
from stores import claim

PAGES = ("/ui/jobs", "/ui/sign-in", "/ui/nothing")


@pytest.fixture
def pages(stack: Stack) -> Iterator[httpx2.Client]:
    """A browser of the service that asks for no key."""
    with httpx2.Client(base_url=stack.url, timeout=60, follow_redirects=True) as client:
        yield client


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A service that asks for keys."""
    settings = ServiceSettings(data=tmp_path_factory.mktemp("locked"), keys="required")
    app = create_app(settings)
    upgrade(app.state.context.database)
    with serve(app) as url:
        yield Stack(url, app.state.context)


@pytest.fixture
def visitor(locked: Stack) -> Iterator[httpx2.Client]:
    """A browser of that service, which sends its own address as the origin of forms."""
    with httpx2.Client(
        base_url=locked.url, timeout=60, follow_redirects=True, headers={"Origin": locked.url}
    ) as client:
        yield client


def make_key(stack: Stack, name: str, *scopes: str) -> str:
    return KeyStore(stack.context.database).create(name, scopes=scopes)[0]


def sign_in(visitor: httpx2.Client, key: str) -> httpx2.Response:
    return visitor.post("/ui/sign-in", data={"key": key, "back": "/ui/jobs"})


def test_the_root_leads_to_the_jobs(pages: httpx2.Client, stack: Stack) -> None:
    job = stack.queued(label="the first")
    answer = pages.get("/")
    assert answer.url.path == "/ui/jobs"
    assert f'href="/ui/jobs/{job.id}"' in answer.text
    assert "the first" in answer.text
    assert "no worker that takes jobs serves the queue cpu" in answer.text


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_nothing_but_files_of_this_host(pages: httpx2.Client, page: str) -> None:
    answer = pages.get(page)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert answer.headers["cache-control"] == "no-store"
    assert not re.search(r"<style|<script(?![^>]*src=)|\son\w+=|style=|https?://", answer.text)


def test_static_files_are_kept_forever_and_known_again(pages: httpx2.Client) -> None:
    found = re.findall(r'"(/ui/static/[^"]+)"', pages.get("/ui/jobs").text)
    assert {address.rpartition("/")[2] for address in found} >= {"style.css", "page.js"}
    for address in set(found):
        first = pages.get(address)
        assert (first.status_code, first.headers["cache-control"]) == (200, FOREVER)
        again = pages.get(address, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        old = re.sub(r"static/\w+", "static/0123", address)
        assert pages.get(old).headers["cache-control"] == "no-cache"
    assert pages.get("/ui/static/0123/absent.js").status_code == 404


def test_what_clients_say_is_shown_and_not_obeyed(pages: httpx2.Client, stack: Stack) -> None:
    job = stack.queued(label="<script>alert(1)</script>")
    for page in ("/ui/jobs", f"/ui/jobs/{job.id}"):
        text = pages.get(page).text
        assert "<script>alert" not in text
        assert "&lt;script&gt;alert(1)" in text


def test_filters_narrow_the_list(pages: httpx2.Client, stack: Stack) -> None:
    kept, other = stack.queued(label="kept"), stack.failed(label="other")
    text = pages.get("/ui/jobs", params={"state": "queued", "label": "kept"}).text
    assert kept.id in text
    assert other.id not in text
    assert kept.id in pages.get("/ui/jobs", params={"label": "KEP", "model": "s/ti"}).text
    for nothing in ("k_pt", "%"):  # no wildcards
        assert "No jobs match" in pages.get("/ui/jobs", params={"label": nothing}).text
    assert "No jobs match" in pages.get("/ui/jobs?model=absent").text
    assert pages.get("/ui/jobs?state=asleep").status_code == 422


def test_several_jobs_are_cancelled_at_once(pages: httpx2.Client, stack: Stack) -> None:
    jobs = [stack.queued().id, stack.queued().id, stack.failed().id, "absent"]
    answer = pages.post("/ui/jobs/cancel", data={"job": jobs})
    assert "2 cancelled, 2 refused: <code>job_finished</code>, <code>job_not_found</code>" in (
        answer.text
    )
    assert {stack.context.jobs.get(job).state for job in jobs[:2]} == {"cancelled"}


def test_several_jobs_are_retried_and_deleted_at_once(pages: httpx2.Client, stack: Stack) -> None:
    done, waiting = stack.failed(label="once more"), stack.queued()
    answer = pages.post("/ui/jobs/retry", data={"job": [done.id, waiting.id]})
    assert "1 retried, 1 refused: <code>job_not_finished</code>" in answer.text
    (again,) = stack.context.jobs.list(parent_id=done.id).jobs
    assert again.spec == done.spec
    answer = pages.post("/ui/jobs/delete", data={"job": [done.id, waiting.id]})
    assert "1 deleted, 1 refused: <code>job_not_finished</code>" in answer.text
    assert not stack.context.jobs.list(label="once more", state="failed").jobs
    assert stack.context.jobs.get(waiting.id).state == "queued"
    assert pages.post("/ui/jobs/burn", data={"job": [waiting.id]}).status_code == 422


def test_acts_on_several_need_the_scope_and_the_own_page(
    visitor: httpx2.Client, locked: Stack
) -> None:
    job = locked.failed()
    for act in ("retry", "delete"):
        assert visitor.post(f"/ui/jobs/{act}", data={"job": job.id}).status_code == 401
    sign_in(visitor, make_key(locked, "looks", "read"))
    for act in ("retry", "delete"):
        assert visitor.post(f"/ui/jobs/{act}", data={"job": job.id}).status_code == 403
    sign_in(visitor, make_key(locked, "changes", "submit", "admin"))
    foreign = {"Origin": "http://elsewhere.example"}
    for act in ("retry", "delete"):
        sent = visitor.post(f"/ui/jobs/{act}", data={"job": job.id}, headers=foreign)
        assert sent.status_code == 403
    assert locked.context.jobs.get(job.id).state == "failed"
    assert "1 deleted" in visitor.post("/ui/jobs/delete", data={"job": job.id}).text


def test_a_sweep_shows_its_cells_and_links(pages: httpx2.Client, stack: Stack) -> None:
    sweep = stack.sweep(**{"budget.code_bits": [3, 4]})
    assert "2 queued" in pages.get("/ui/sweeps").text
    text = pages.get(f"/ui/sweeps/{sweep}").text
    first = stack.context.sweeps.cells(sweep)[1]
    assert f'href="/ui/jobs/{first.id}"' in text
    assert "budget.code_bits" in text
    assert f'href="/ui/sweeps/{sweep}"' in pages.get(f"/ui/jobs/{first.id}").text
    assert "2 cancelled" in pages.post(f"/ui/sweeps/{sweep}/cancel").text
    assert sweep not in pages.post(f"/ui/sweeps/{sweep}/delete").text
    assert pages.get(f"/ui/sweeps/{sweep}").status_code == 404


def test_a_finished_job_lists_its_files_and_ways_to_take_them(
    pages: httpx2.Client, stack: Stack
) -> None:
    job = stack.succeeded()
    text = pages.get(f"/ui/jobs/{job.id}").text
    for file in stack.context.jobs.artifacts(job.id):
        assert file.sha256 in text
        assert f'href="/v1/jobs/{job.id}/files/{file.path}"' in text
    assert f"bitmill download {job.id} --url {stack.url} --out packed" in text
    assert f"HF_ENDPOINT={stack.url} hf download jobs/{job.id} --local-dir packed" in text
    assert f"curl -L -C - -O {stack.url}/v1/jobs/{job.id}/files/model.safetensors" in text
    assert "vllm serve packed" in text
    assert "sglang.launch_server --model-path packed" in text
    assert "Bearer" not in text


def test_the_time_left_is_a_range(pages: httpx2.Client, stack: Stack) -> None:
    job = stack.running()
    page = f"/ui/jobs/{job.id}"
    assert "not known yet" in pages.get(page).text
    told = {"stage": "refine", "done": 2, "total": 4, "unit": "block", "margin_s": [-3600, 7200]}
    assert stack.leases.report(job.id, job.token, [], progress=told, remaining_s=7290.0)
    left = re.findall(r"<dt>Time left</dt><dd>(1 h \d min) to (4 h \d min)", pages.get(page).text)
    assert left == [("1 h 1 min", "4 h 1 min")]
    assert stack.leases.report(job.id, job.token, [], remaining_s=-7300.0)
    assert "longer than expected" in pages.get(page).text


def test_a_failed_job_says_why_and_can_be_retried(pages: httpx2.Client, stack: Stack) -> None:
    job = stack.failed()
    text = pages.get(f"/ui/jobs/{job.id}").text
    assert "it is broken" in text
    assert "invalid_model" in text
    again = pages.post(f"/ui/jobs/{job.id}/retry", data={})
    assert again.status_code == 200
    assert stack.context.jobs.get(again.url.path.rpartition("/")[2]).parent_id == job.id


def test_a_cancelled_job_was_cancelled(pages: httpx2.Client, stack: Stack) -> None:
    job = stack.queued()
    assert "cancelled" in pages.post(f"/ui/jobs/{job.id}/cancel", data={}).text
    assert stack.context.jobs.get(job.id).state == "cancelled"
    refused = pages.post(f"/ui/jobs/{stack.failed().id}/cancel", data={})
    assert refused.status_code == 409
    assert "has already failed" in refused.text


def test_two_specifications_are_told_apart(pages: httpx2.Client, stack: Stack) -> None:
    ours, theirs = stack.queued(seed=1).id, stack.queued(seed=7, budget={"code_bits": 4}).id
    text = pages.get(f"/ui/jobs/{ours}", params={"against": theirs}).text
    rows = re.findall(r"<td><code>([\w.]+)</code></td><td>(.*?)</td><td>(.*?)</td>", text)
    assert rows == [("budget.code_bits", "3.0", "4.0"), ("seed", "1", "7")]
    same = pages.get(f"/ui/jobs/{ours}", params={"against": ours})
    assert "Both jobs have the same specification" in same.text
    assert pages.get(f"/ui/jobs/{ours}?against=absent").status_code == 404


def test_refusals_are_pages_too(pages: httpx2.Client) -> None:
    for address, status in (("/ui/jobs/absent", 404), ("/ui/absent", 404), ("/ui/jobs/a%20b", 422)):
        answer = pages.get(address)
        assert answer.status_code == status
        assert answer.headers["content-type"].startswith("text/html")
        assert answer.headers["x-request-id"] in answer.text
    assert pages.post("/ui/jobs/cancel", json={}).status_code == 415


def test_who_has_no_key_is_asked_for_one(visitor: httpx2.Client) -> None:
    for address in ("/ui/jobs", "/ui/jobs/absent"):
        answer = visitor.get(address)
        assert answer.status_code == 401
        assert 'name="key"' in answer.text
        assert f'value="{address}"' in answer.text
    assert visitor.get("/ui/sign-in").status_code == 200


def test_signing_in_keeps_the_key_from_scripts_and_other_sites(
    visitor: httpx2.Client, locked: Stack
) -> None:
    key = make_key(locked, "ann", "read", "submit")
    answer = visitor.post("/ui/sign-in", data={"key": key}, follow_redirects=False)
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 303
    assert {"HttpOnly", "SameSite=strict", "Path=/", "Max-Age=28800"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    tls = {"Origin": locked.url.replace("http:", "https:")}
    secure = visitor.post("/ui/sign-in", data={"key": key}, headers=tls, follow_redirects=False)
    assert "Secure" in secure.headers["set-cookie"]


def test_a_wrong_key_signs_nobody_in(visitor: httpx2.Client) -> None:
    for key in ("", "bm_no", "bm_aaaaaaaa_" + "a" * 40):
        answer = sign_in(visitor, key)
        assert answer.status_code == 401
        assert "unknown, mistyped, expired or revoked" in answer.text
        assert "set-cookie" not in answer.headers


def test_signing_in_leads_nowhere_else(visitor: httpx2.Client, locked: Stack) -> None:
    key = make_key(locked, "lea", "read")
    for back in ("https://evil.example/ui/", "//evil.example", "/ui/\\evil.example", ""):
        answer = visitor.post(
            "/ui/sign-in", data={"key": key, "back": back}, follow_redirects=False
        )
        assert answer.headers["location"] == "/ui/jobs"


def test_a_signed_in_browser_sees_and_does_what_its_key_may(
    visitor: httpx2.Client, locked: Stack
) -> None:
    own, foreign = locked.context.jobs, locked.queued(label="of the local tenant")
    key = make_key(locked, "bob", "read", "submit")
    assert "Sign out bob" in sign_in(visitor, key).text
    assert foreign.id not in visitor.get("/ui/jobs").text
    assert visitor.get(f"/ui/jobs/{foreign.id}").status_code == 404
    assert visitor.get("/v1/jobs").status_code == 200
    assert visitor.get("/v1/keys").status_code == 403
    answer = visitor.post("/ui/jobs/cancel", data={"job": [foreign.id]})
    assert "0 cancelled, 1 refused" in answer.text
    assert own.get(foreign.id).state == "queued"
    visitor.post("/ui/sign-out", data={})
    assert visitor.get("/ui/jobs").status_code == 401


def test_a_key_that_may_only_read_is_offered_no_change(
    visitor: httpx2.Client, locked: Stack
) -> None:
    sign_in(visitor, make_key(locked, "eve", "read"))
    assert "Cancel" not in visitor.get("/ui/jobs").text
    answer = visitor.post("/ui/jobs/cancel", data={"job": []})
    assert answer.status_code == 403
    assert "You may not see this page" in answer.text
    assert "needs the scope submit" in answer.text


def test_a_revoked_key_is_signed_out(visitor: httpx2.Client, locked: Stack) -> None:
    key = make_key(locked, "tim", "read")
    sign_in(visitor, key)
    KeyStore(locked.context.database).revoke(key.split("_")[1])
    locked.context.keys.forget()
    assert visitor.get("/ui/jobs").status_code == 401


@pytest.mark.parametrize("origin", ["https://evil.example", "null", None])
def test_another_site_can_use_no_sign_in(
    visitor: httpx2.Client, locked: Stack, origin: str | None
) -> None:
    sign_in(visitor, make_key(locked, "sue", "read", "submit", "admin"))
    job = locked.queued()
    del visitor.headers["Origin"]
    headers = {} if origin is None else {"Origin": origin}
    for address in (f"/ui/jobs/{job.id}/cancel", f"/v1/jobs/{job.id}/cancel"):
        answer = visitor.post(address, data={}, headers=headers)
        assert answer.status_code == 403
    assert locked.context.jobs.get(job.id).state == "queued"


def filled(**fields: str) -> dict[str, str]:
    """What the form of a new job sends for the tiny model."""
    usual = {"source": "path", "name": "models/tiny", "kind": "code_bits", "value": "3"}
    return usual | {"method": "uniform"} | fields


def test_a_plan_says_what_a_job_costs_and_creates_nothing(
    pages: httpx2.Client, stack: Stack
) -> None:
    before = stack.context.jobs.counts()
    text = pages.post("/ui/jobs/new", data=filled()).text
    assert "llama, 2 blocks, 14 linears" in text
    assert "about <strong>" in text
    low, high = re.findall(r"<span>([\d.]+ .?B) at (\d) bits</span>", text)
    assert (low[1], high[1]) == ("2", "8")
    assert "vLLM with bitmill-vllm, SGLang with bitmill-sglang" in text
    exports = '{"exports": [{"format": "dequantized"}]}'
    text = pages.post("/ui/jobs/new", data=filled(more=exports)).text
    assert re.search(r"export dequantized, [\d.]+ .?B to [\d.]+ .?B: transformers, vLLM<", text)
    assert stack.context.jobs.counts() == before


def test_a_target_in_bytes_is_read_with_its_unit(pages: httpx2.Client) -> None:
    answer = pages.post("/ui/jobs/new", data=filled(kind="size", value="0.4 MB"))
    assert "about <strong>400.0 kB</strong>" in answer.text
    for no_size in ("much", "nan", "inf"):
        answer = pages.post("/ui/jobs/new", data=filled(kind="size", value=no_size))
        assert "is no size" in answer.text
    twice = pages.post("/ui/jobs/new", data=filled(more='{"seed": 1, "seed": 2}'))
    assert "appears twice" in twice.text


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": "models/absent"}, "models/absent"),
        ({"value": "1"}, "cannot be met"),
        ({"value": "three"}, "is no number"),
        ({"length": "some"}, "is no whole number"),
        ({"more": "{"}, "are not JSON"),
        ({"more": "[" * 100_000}, "are not JSON"),
        ({"more": "3"}, "are no JSON object"),
        ({"more": '{"unknown": 1}'}, "unknown"),
        ({"source": "moon"}, "not made by this page"),
        ({"priority": "200"}, "priority 200"),
    ],
)
def test_what_is_wrong_with_a_form_is_said_and_what_was_typed_stays(
    pages: httpx2.Client, stack: Stack, fields: dict[str, str], problem: str
) -> None:
    before = stack.context.jobs.counts()
    answer = pages.post("/ui/jobs", data=filled(label="kept", **fields))
    assert answer.status_code == 422
    assert "as the message says" not in answer.text
    assert answer.text.lower().count("raise the budget") == (problem == "cannot be met")
    assert problem in answer.text
    assert 'value="kept"' in answer.text
    assert stack.context.jobs.counts() == before


def test_a_form_sent_twice_gives_one_job(pages: httpx2.Client, stack: Stack) -> None:
    once = re.findall(r'name="once" value="(\w+)"', pages.get("/ui/jobs/new").text)[0]
    more = '{"evaluation": {"texts": ["wiki_evaluation"]}, "seed": 5}'
    form = filled(once=once, label="sent twice", priority="3", more=more)
    first, again = (pages.post("/ui/jobs", data=form).url.path for _ in range(2))
    assert first == again
    job = stack.context.jobs.get(first.rpartition("/")[2])
    assert (job.label, job.priority, job.spec["seed"]) == ("sent twice", 3, 5)
    assert job.spec["budget"]["code_bits"] == 3
    other = pages.post("/ui/jobs", data=form | {"value": "4"}).url.path
    assert other != first


def test_a_clone_asks_for_the_same(pages: httpx2.Client, stack: Stack) -> None:
    job = stack.queued(
        label="first",
        seed=7,
        budget={"memory": 10**9, "context": 512, "batch": 2},
        effort="balanced",
        calibration={"sequences": 8, "length": 64, "text": {"source": "dataset", "name": "a/b"}},
        refinement={"method": "gptq", "asymmetric": False},
    )
    page = pages.get("/ui/jobs/new", params={"like": job.id}).text
    fields = dict(re.findall(r'<input name="(\w+)" value="([^"]*)"', page))
    fields |= dict(re.findall(r'<select name="(\w+)">.*?value="([^"]*)" selected', page))
    more = re.search(r'<textarea name="more"[^>]*>(.*?)</textarea>', page, re.DOTALL)
    assert more is not None
    fields["more"] = html.unescape(more[1])
    assert "seed" in fields["more"]
    assert fields["kind"] == "memory"
    clone = parse_spec(specification({**DEFAULTS, **fields}))
    assert clone.model_dump(mode="json") == job.spec


def test_a_form_without_windows_takes_those_of_the_effort() -> None:
    def asked(**fields: str) -> int:
        form = {**DEFAULTS, **filled(**{"code": "trellis", "effort": "best", **fields})}
        return parse_spec(specification(form)).calibration.sequences

    assert (asked(), asked(effort="fast"), asked(sequences="64")) == (160, 64, 64)


def test_an_export_has_a_page_and_no_clone(pages: httpx2.Client, stack: Stack) -> None:
    made = stack.succeeded()
    spec = ExportSpec(
        model=PathModel(path="models/tiny"), job_id=made.id, format="dequantized", label="exported"
    )
    job = stack.context.jobs.submit(spec, parent_id=made.id).job
    text = pages.get(f"/ui/jobs/{job.id}").text
    assert "as dequantized" in text
    assert "Export of" in text
    assert "Clone" not in text
    assert "as dequantized" in pages.get("/ui/jobs").text
    assert pages.get("/ui/jobs/new", params={"like": job.id}).status_code == 409


def test_a_key_that_may_only_read_gets_no_form(visitor: httpx2.Client, locked: Stack) -> None:
    sign_in(visitor, make_key(locked, "may", "read"))
    text = visitor.get("/ui/jobs/new").text
    assert "may read but not submit jobs" in text
    assert 'name="value"' not in text
    assert visitor.post("/ui/jobs", data=filled()).status_code == 403


def test_shelves_list_and_delete_what_is_on_them(pages: httpx2.Client, stack: Stack) -> None:
    catalog = stack.context.catalog
    catalog.add_profile("ab" * 16, model="models/tiny", settings={}, path="absent")
    stored = catalog.add_map(MAP, name="by hand")
    digest = hashlib.sha256(b"{}").hexdigest()
    upload = pages.post(
        "/v1/uploads",
        json={"files": [{"path": "learned_parameters.json", "size": 2, "sha256": digest}]},
    ).json()
    shelves = {
        "profiles": ("ab" * 16, "models/tiny"),
        "bit-width-maps": (stored.id, "2 bits: 1, 3 bits: 2, 4 bits: 1"),
        "uploads": (upload["id"], "open"),
    }
    for shelf, (name, told) in shelves.items():
        text = pages.get(f"/ui/{shelf}").text
        assert name in text
        assert told in text
        assert name not in pages.post(f"/ui/{shelf}/{name}/delete", data={}).text


def test_workers_are_drained_and_queues_paused(pages: httpx2.Client, stack: Stack) -> None:
    name = "cpu@host 1"
    stack.context.catalog.beat(name, host="host", queues=("cpu",), device="cpu", version="1")
    job = stack.queued()
    waits = f"/ui/jobs/{job.id}"
    queued = stack.context.jobs.counts()["queued"]
    assert f'<td>open</td><td class="number">{queued}</td>' in pages.get("/ui/workers").text
    assert "idle" in pages.get("/ui/workers").text
    assert "<td>cpu</td><td>none</td>" in pages.get("/ui/workers").text
    stack.context.catalog.beat(
        name,
        host="host",
        queues=("cpu",),
        device="cuda",
        version="1",
        memory=(3 * 10**9, 8 * 10**10),
    )
    assert "<td>cuda</td><td>3.0 GB free of 80.0 GB</td>" in pages.get("/ui/workers").text
    pages.post("/ui/workers/queues/cpu/pause", data={})
    assert "the queue cpu is paused" in pages.get(waits).text
    pages.post("/ui/workers/queues/cpu/resume", data={})
    drain = re.findall(r'action="(/ui/workers/cpu[^"]+/drain)"', pages.get("/ui/workers").text)[0]
    assert "takes no more jobs" in pages.post(html.unescape(drain), data={}).text
    assert "no worker that takes jobs" in pages.get(waits).text
    pages.post(html.unescape(drain).replace("/drain", "/resume"), data={})
    assert "no worker that takes jobs" not in pages.get(waits).text
    stack.context.catalog.leave(name)


def test_keys_are_made_shown_once_and_revoked(visitor: httpx2.Client, locked: Stack) -> None:
    sign_in(visitor, make_key(locked, "root", "read", "submit", "admin"))
    form = {"name": "new", "scope": ["read", "submit"], "days": "1.5"}
    made = visitor.post("/ui/keys", data=form)
    key = re.findall(r'id="made">(bm_\w+)<', made.text)[0]
    assert made.headers["cache-control"] == "no-store"
    assert key not in visitor.get("/ui/keys").text
    record = locked.context.keys.store.find(key)
    assert record is not None
    assert (record.name, set(record.scopes)) == ("new", {"read", "submit"})
    assert record.expires_at == pytest.approx(record.created_at + 1.5 * 86400, abs=1)
    visitor.post(f"/ui/keys/{record.id}/revoke", data={})
    assert locked.context.keys.store.find(key) is None
    for wrong in ({"name": "no name!"}, {"days": "soon"}, {"days": "nan"}, {"scope": []}):
        answer = visitor.post("/ui/keys", data=form | wrong)
        assert (answer.status_code, "made" in answer.text) == (422, False), wrong


def test_pages_of_the_operator_need_his_key(visitor: httpx2.Client, locked: Stack) -> None:
    sign_in(visitor, make_key(locked, "user", "read", "submit"))
    home = visitor.get("/ui/jobs").text
    for page in ("/ui/workers", "/ui/keys"):
        assert f'href="{page}"' not in home
        answer = visitor.get(page)
        assert answer.status_code == 403
        assert "needs the scope admin" in answer.text
    assert visitor.post("/ui/keys", data={"name": "own"}).status_code == 403


def test_the_timeline_says_what_each_stage_came_to(pages: httpx2.Client, stack: Stack) -> None:
    job = stack.running()
    told = [
        ("resolve", "skipped"),
        ("plan", "started"),
        ("plan", "finished"),
        ("refine", "started"),
    ]
    events = [("stage", {"stage": stage, "state": state}) for stage, state in told]
    assert stack.leases.report(job.id, job.token, events, stage="refine")

    def states() -> dict[str, str]:
        text = pages.get(f"/ui/jobs/{job.id}").text
        return dict(
            (stage, state)
            for state, stage in re.findall(
                r'<li class="(\w+)"><span class="stage">(\w+)</span>', text
            )
        )

    now = {"resolve": "skipped", "plan": "finished", "refine": "started", "pack": "waiting"}
    assert {stage: states()[stage] for stage in now} == now
    assert stack.leases.fail(job.id, job.token, ModelError("it is broken"))
    then = now | {"refine": "stopped", "pack": "unused"}
    assert {stage: states()[stage] for stage in then} == then


def test_workers_show_how_far_they_are(pages: httpx2.Client, stack: Stack) -> None:
    name = "cpu@busy"
    stack.context.catalog.beat(name, host="host", queues=("cpu",), device="cpu", version="1")
    before = stack.context.jobs.load().get("cpu", {}).get("running", 0)
    job = claim(stack.leases, stack.queued().id, owner=name)
    told = {"stage": "refine", "done": 3, "total": 4, "unit": "block"}
    assert stack.leases.report(
        job.id, job.token, [("progress", told)], stage="refine", progress=told
    )
    text = pages.get("/ui/workers").text
    assert re.search(rf"{job.id[-12:]}</a> refine 3 of 4 <progress max=\"100\" value=\"75\"", text)
    shown = httpx2.get(f"{stack.url}/v1/workers").json()
    (cpu,) = [queue for queue in shown["queues"] if queue["name"] == "cpu"]
    assert cpu["running"] == before + 1
    stack.context.catalog.leave(name)
