"""The pages in a real browser: what is on them, what they do while a job runs, who may enter."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from urllib.parse import urlencode

import pytest

from bitmill_service.embedded.server import EmbeddedService
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.keys import KeyStore
from bitmill_workers.store.migrate import upgrade
from browsing import THEMES, WIDTHS, Browser, whole
from finished import MAP, Stack
from serving import serve
from stores import claim, wait_for
from tiny import CALIBRATION


def report(stack: Stack, job_id: str, stage: str, state: str, done: int | None = None) -> None:
    """Let a runner say that a stage changes or, with `done`, how many of 4 blocks it has done."""
    job = stack.context.jobs.get(job_id)
    told: dict[str, object] = {"stage": stage, "state": state}
    if done is not None:
        told = {"stage": stage, "done": done, "total": 4, "unit": "block"}
    kind = "stage" if done is None else "progress"
    progress = None if done is None else told
    assert stack.leases.report(job.id, job.token, [(kind, told)], stage=stage, progress=progress)


def test_pages_are_legible_in_both_themes_and_on_a_phone(
    browser: Browser, stack: Stack, pictures: Path
) -> None:
    running, done = (
        stack.running(label="a job that runs"),
        stack.succeeded(label="a job that is done"),
    )
    stack.queued(label="a job that waits")
    catalog = stack.context.catalog
    catalog.add_profile("ab" * 16, model="models/tiny", settings={}, path="absent")
    catalog.add_map(MAP, name="by hand")
    catalog.beat("cpu@host-1", host="host", queues=("cpu",), device="cpu", version="1")
    report(stack, running.id, "refine", "started")
    report(stack, running.id, "refine", "", 3)
    pages = {
        "jobs": "/ui/jobs",
        "running": f"/ui/jobs/{running.id}",
        "done": f"/ui/jobs/{done.id}?against={running.id}",
        "sweeps": "/ui/sweeps",
        "sweep": f"/ui/sweeps/{stack.sweep(**{'budget.code_bits': [3, 4], 'seed': [0, 1]})}",
        "failed": f"/ui/jobs/{stack.failed(label='a job that failed').id}",
        "new": "/ui/jobs/new?source=path&name=models/tiny&more={}",
        "profiles": "/ui/profiles",
        "maps": "/ui/bit-width-maps",
        "uploads": "/ui/uploads",
        "workers": "/ui/workers",
        "keys": "/ui/keys",
        "problem": "/ui/jobs/absent",
        "sign-in": "/ui/sign-in",
    }
    for name, page in pages.items():
        browser.open(page)
        for theme, rules in zip(THEMES, ("", "color-contrast"), strict=True):
            for width, pixels in WIDTHS.items():
                browser.look(theme, pixels)
                fits = "return document.documentElement.scrollWidth <= innerWidth"
                assert browser.run(fits), f"{name} on a {width} screen"
                browser.picture(pictures / f"{name}-{theme}-{width}.png")
            assert browser.violations(rules) == [], f"{name}, {theme}"


def test_the_theme_is_chosen_and_remembered(browser: Browser) -> None:
    browser.open("/ui/jobs")
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    browser.click("#theme")
    dark = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert dark != ground
    browser.open("/ui/sign-in")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == dark
    browser.run("localStorage.clear()")


def test_the_plan_follows_the_form(browser: Browser, stack: Stack) -> None:
    browser.open("/ui/jobs/new")
    browser.shows("as soon as a model is named", "#plan")
    browser.run("document.querySelector('[name=source]').value = 'path'")
    browser.fill("name", "models/tiny")
    browser.shows("2 blocks, 14 linears", "#plan")
    browser.fill("value", "1")
    browser.shows("cannot be met", "#plan")
    browser.fill("value", "2.5")
    browser.shows("2.50 bits a weight", "#plan")
    browser.fill("label", "from the form")
    browser.click_text("button", "Submit the job")
    browser.shows("from the form", "h1")
    job = stack.context.jobs.list(label="from the form").jobs[0]
    assert job.spec["budget"] == {"code_bits": None, "bits": 2.5, "size": None}


def test_a_job_is_followed_without_loading_the_page_again(browser: Browser, stack: Stack) -> None:
    job = stack.running(label="followed")
    browser.open(f"/ui/jobs/{job.id}")
    browser.run("window.same = true")
    report(stack, job.id, "refine", "started")
    report(stack, job.id, "refine", "", 2)
    browser.shows("2 of 4 blocks", "#stages")
    report(stack, job.id, "refine", "", 4)
    report(stack, job.id, "refine", "finished")
    stack.finish(job)
    browser.shows("succeeded", "#state")
    browser.shows("model.safetensors", "#files")
    assert browser.run("return window.same")


def test_the_list_follows_and_keeps_what_is_ticked(browser: Browser, stack: Stack) -> None:
    kept, other = stack.queued(label="ticked"), stack.queued(label="left alone")
    browser.open("/ui/jobs")
    browser.run("window.same = true")
    browser.click(f"#pick-{kept.id}")
    stack.context.jobs.request_cancel(other.id)
    browser.shows("cancelled", f"tr:has(#pick-{other.id})")
    assert browser.find(f"#pick-{kept.id}").is_selected()
    assert browser.run("return window.same")
    browser.click_text("button", "Cancel the selected jobs")
    browser.shows("1 cancelled")
    assert stack.context.jobs.get(kept.id).state == "cancelled"
    browser.click(f"#pick-{kept.id}")
    browser.click_text("button", "Delete them")
    browser.shows("1 deleted")
    assert not browser.run(f"return document.getElementById('pick-{kept.id}')")


def test_a_sweep_is_followed_without_loading_the_page_again(browser: Browser, stack: Stack) -> None:
    sweep = stack.sweep(**{"budget.code_bits": [3, 4]})
    browser.open(f"/ui/sweeps/{sweep}")
    browser.run("window.same = true")
    browser.shows("2 queued", "#state")
    first, second = (job.id for job in stack.context.sweeps.cells(sweep).values())
    stack.context.jobs.request_cancel(second)
    browser.shows("1 cancelled, 1 queued", "#state")
    report(stack, claim(stack.leases, first).id, "refine", "", 3)
    browser.shows("refine 3 of 4", "#cells")
    stack.finish(stack.context.jobs.get(first))
    browser.shows("1 cancelled, 1 succeeded", "#state")
    assert browser.run("return window.same")
    browser.click_text("button", "Delete with all of its jobs")
    browser.until(lambda: browser.driver.current_url.endswith("/ui/sweeps"), "the list")


def test_a_job_is_cancelled_and_tried_again(browser: Browser, stack: Stack) -> None:
    job = stack.queued(label="not this time")
    browser.open(f"/ui/jobs/{job.id}")
    browser.click_text("button", "Cancel")
    browser.shows("cancelled", "#state")
    browser.click_text("button", "Retry")
    browser.shows("queued", "#state")
    browser.click_text("a", job.id[-12:])
    browser.shows("cancelled", "#state")


def test_a_downloaded_file_is_the_one_that_was_listed(
    browser: Browser, stack: Stack, downloads: Path
) -> None:
    job = stack.succeeded(weights=b"packed" * 50_000)
    browser.open(f"/ui/jobs/{job.id}")
    browser.click("a[href$='model.safetensors']")
    file = downloads / "model.safetensors"
    wait_for(whole(file), "the download")
    assert hashlib.sha256(file.read_bytes()).hexdigest() in browser.text("#files")


@pytest.mark.e2e
@pytest.mark.usefixtures("forked")
def test_a_job_of_the_form_is_watched_to_its_end(
    browser: Browser, models: Path, tmp_path: Path, downloads: Path
) -> None:
    """A real worker and runner, on the tiny model, from the form to a file's digest."""
    settings = ServiceSettings(data=tmp_path, port=0, model_roots={"models": models})
    shutil.copy(CALIBRATION, models / "text.txt")
    quick = {
        "allocation": {"order": "natural"},
        "refinement": {"method": "rtn"},
        "calibration": {"held_out": 0, "text": {"source": "file", "path": "models/text.txt"}},
        "evaluation": {"texts": ["wiki_evaluation"], "sequences": 1, "length": 32},
        "threads": 1,
    }
    asked = {
        "source": "path",
        "name": "models/tiny",
        "method": "uniform",
        "label": "watched",
        "sequences": "1",
        "length": "32",
        "more": json.dumps(quick),
    }
    with EmbeddedService(settings) as service:
        browser.url = service.url
        browser.open(f"/ui/jobs/new?{urlencode(asked)}")
        browser.shows("2 blocks, 14 linears", "#plan")
        browser.click_text("button", "Submit the job")
        browser.shows("watched", "h1")
        browser.run("window.same = true")
        browser.shows("succeeded", "#state", timeout=240)
        browser.shows("publish", "#stages")
        assert browser.run("return document.querySelectorAll('#stages .finished').length") >= 6
        assert "finished" in browser.text("#log")
        browser.click("a[href$='bit_width_map.json']")
        file = downloads / "bit_width_map.json"
        wait_for(whole(file), "the download")
        assert hashlib.sha256(file.read_bytes()).hexdigest() in browser.text("#files")
        assert browser.run("return window.same")
        browser.leave()


def test_a_key_lets_in_until_it_is_signed_out(browser: Browser, tmp_path: Path) -> None:
    app = create_app(ServiceSettings(data=tmp_path, keys="required"))
    context = app.state.context
    upgrade(context.database)
    key, _ = KeyStore(context.database).create("ann", scopes=("read", "submit"))
    with serve(app) as browser.url:
        browser.open("/ui/jobs")
        browser.fill("key", "bm_wrong")
        browser.click_text("button", "Sign in")
        browser.shows("unknown, mistyped")
        browser.fill("key", key)
        browser.click_text("button", "Sign in")
        browser.shows("No jobs yet")
        assert browser.run("return document.cookie") == ""
        browser.click_text("button", "Sign out ann")
        browser.shows("Sign in", "h1")
        browser.open("/ui/jobs")
        browser.shows("this call needs an API key")
        browser.leave()
