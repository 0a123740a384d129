"""The map explorer, the budget slider and the comparison: without a script, and in a browser."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import httpx2
import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.plan.model_plan import Plan
from bitmill_service.main import create_app
from bitmill_service.settings import ServiceSettings
from bitmill_workers.store.keys import KeyStore
from bitmill_workers.store.migrate import upgrade
from bitmill_workers.store.records import JobRecord
from browsing import THEMES, WIDTHS, Browser, whole
from finished import Stack
from finished_models import finish_model
from plans import llama_plan
from serving import serve
from stores import wait_for


@pytest.fixture(scope="module")
def plan() -> Plan:
    return llama_plan(blocks=3)


@pytest.fixture(scope="module")
def job(stack: Stack, plan: Plan) -> JobRecord:
    return finish_model(stack, plan, 3.2, label="three bits")


@pytest.fixture(scope="module")
def larger(stack: Stack, plan: Plan) -> JobRecord:
    return finish_model(stack, plan, 4.2, label="four bits", measured=0.9)


@pytest.fixture(scope="module")
def worse(stack: Stack, plan: Plan) -> JobRecord:
    return finish_model(stack, plan, 4.4, label="beaten", measured=40)


@pytest.fixture(scope="module")
def found(http: httpx2.Client, job: JobRecord) -> BitWidthMap:
    answer = http.get(f"/v1/jobs/{job.id}/bit-width-map")
    return BitWidthMap.model_validate(answer.json())


def page(http: httpx2.Client, path: str) -> str:
    answer = http.get(path)
    assert answer.status_code == 200, answer.text
    return answer.text


def cells(html: str) -> list[str]:
    return re.findall(r"<td class=\"number\">([^<]*)</td>", html)


def test_the_map_is_a_table_without_scripts(
    http: httpx2.Client, job: JobRecord, found: BitWidthMap
) -> None:
    table = cells(page(http, f"/ui/jobs/{job.id}/map"))
    assert table == [f"{sum(w) / len(w):.2f}" for w in found.linears.values()]


def test_map_of_an_unfinished_job_says_so(http: httpx2.Client, stack: Stack) -> None:
    answer = http.get(f"/ui/jobs/{stack.queued().id}/map")
    assert (answer.status_code, "has no files" in answer.text) == (409, True)


def test_a_budget_is_answered_and_submitted_without_scripts(
    http: httpx2.Client, stack: Stack, job: JobRecord, larger: JobRecord, worse: JobRecord
) -> None:
    url = f"/ui/profiles/{job.profile_id}"
    html = page(http, f"{url}?kind=bits&value=3.5")
    assert "3.50 (3." in html
    assert "measured 0.57 to 1.42 times" in html  # three jobs measured three texts
    answer = http.post(f"{url}/jobs", data={"kind": "size", "value": "1.75", "batch": "1"})
    assert answer.status_code == 303, answer.text
    made = stack.context.jobs.get(answer.headers["location"].rpartition("/")[2])
    assert made.spec["budget"]["size"] == 1_750_000
    assert made.spec["budget"]["bits"] is None
    assert made.spec["allocation"]["method"] == "knapsack"
    assert made.spec["model"] == job.spec["model"]
    wrong = http.post(f"{url}/jobs", data={"kind": "size", "value": "nothing"})
    assert (wrong.status_code, "value" in wrong.text) == (422, True)


def test_jobs_of_a_profile_tell_how_far_to_trust_it(http: httpx2.Client, stack: Stack) -> None:
    jobs = [finish_model(stack, llama_plan(blocks=1), 3, measured=m) for m in (0.8, 1, 1.1, 1.2)]
    html = page(http, f"/ui/profiles/{jobs[0].profile_id}?kind=bits&value=3")
    assert "measured 0.80 to 1.20 times theirs" in html


def test_a_key_that_only_reads_moves_the_slider_and_submits_nothing(
    http: httpx2.Client, tmp_path: Path, plan: Plan
) -> None:
    app = create_app(ServiceSettings(data=tmp_path, keys="required"))
    upgrade(app.state.context.database)
    key, _ = KeyStore(app.state.context.database).create("ann", tenant="local", scopes=("read",))
    with serve(app) as url, httpx2.Client(base_url=url) as reader:
        job = finish_model(Stack(url, app.state.context), plan)
        reader.headers["Authorization"] = f"Bearer {key}"
        html = page(reader, f"/ui/profiles/{job.profile_id}")
        assert "data-maps" in html
        assert "data-allocate" not in html
        assert "Submit a job" not in html
        form = {"kind": "bits", "value": "3"}
        refused = reader.post(f"/ui/profiles/{job.profile_id}/jobs", data=form)
        assert refused.status_code == 403


def test_comparison_shows_numbers_errors_and_the_pareto_line(
    http: httpx2.Client, job: JobRecord, larger: JobRecord, worse: JobRecord
) -> None:
    chosen = "&".join(f"job={one.id}" for one in (job, larger, worse))
    html = page(http, f"/ui/compare?{chosen}")
    rows = re.findall(r"<tr><td class=\"number\">(\d)</td>.*?<td>(yes|no)</td></tr>", html, re.S)
    assert rows == [("1", "yes"), ("2", "yes"), ("3", "no")]
    drawings = re.findall(r"<svg.*?</svg>", html, re.S)
    assert [len(re.findall("<circle", drawing)) for drawing in drawings] == [3, 3]
    line = re.search(r'<polyline points="([^"]*)"', drawings[1])
    assert line is not None
    assert len(line[1].split()) == 2
    bars = re.search(r'<path d="([^"]*)"', drawings[1])
    assert bars is not None
    assert bars[1].count("V") == 3
    assert "Reports side by side" in html


def test_comparison_offers_finished_jobs_and_names_absent_ones(
    http: httpx2.Client, job: JobRecord
) -> None:
    assert f'value="{job.id}"' in page(http, "/ui/compare")
    assert http.get("/ui/compare?job=absent").status_code == 404


def test_pages_are_legible_in_both_themes_and_on_a_phone(
    browser: Browser, job: JobRecord, larger: JobRecord, pictures: Path
) -> None:
    addresses = {
        "map": f"/ui/jobs/{job.id}/map#model.layers.1.mlp.down_proj",
        "budget": f"/ui/profiles/{job.profile_id}",
        "compare": f"/ui/compare?job={job.id}&job={larger.id}",
    }
    for name, address in addresses.items():
        if name == "compare":
            browser.open(address)
        else:
            open_drawn(browser, address)
        for theme, rules in zip(THEMES, ("", "color-contrast"), strict=True):
            for width, pixels in WIDTHS.items():
                browser.look(theme, pixels)
                fits = "return document.documentElement.scrollWidth <= innerWidth"
                assert browser.run(fits), f"{name} on a {width} screen"
                browser.picture(pictures / f"{name}-{theme}-{width}.png")
            assert browser.violations(rules) == [], f"{name}, {theme}"


def test_groups_are_opened_by_mouse_and_by_keyboard(
    browser: Browser, job: JobRecord, found: BitWidthMap
) -> None:
    canvas = open_drawn(browser, f"/ui/jobs/{job.id}/map")
    canvas.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    browser.shows("model.layers.1.self_attn.k_proj: width", "[data-reading]")
    canvas.send_keys(Keys.ENTER)
    browser.shows("model.layers.1.self_attn.k_proj", "#groups h2")
    shown = browser.run(
        "return [...document.querySelectorAll('#groups tbody tr')].map(r => r.cells[2].textContent)"
    )
    assert tuple(map(int, shown)) == found.linears["model.layers.1.self_attn.k_proj"]
    browser.click("[data-close]")
    assert browser.run("return document.activeElement === arguments[0]", canvas)
    browser.run("arguments[0].scrollIntoView()", canvas)
    canvas.click()  # its middle: block 0, below the legend, and the fourth of seven modules
    browser.shows("model.layers.0.self_attn.o_proj", "#groups h2")


def test_colours_and_the_table_show_what_is_chosen(browser: Browser, job: JobRecord) -> None:
    open_drawn(browser, f"/ui/jobs/{job.id}/map")
    browser.click("#map-table summary")
    pixels = "return document.querySelector('#explorer canvas').toDataURL()"
    seen = {browser.run(pixels)}
    for colour in ("sensitivity", "error", "bytes"):
        browser.click(f"[name=colour][value={colour}]")
        seen.add(browser.run(pixels))
    assert len(seen) == 4
    browser.shows("stored bytes", "#map-table caption")
    browser.shows("kB", "#map-table tbody td")


def test_experts_share_a_cell_and_are_chosen_one_by_one(browser: Browser, stack: Stack) -> None:
    widths = {f"model.layers.0.mlp.experts.{e}.up_proj": digits for e, digits in enumerate("2468")}
    found = BitWidthMap.model_validate({"linears": {"model.embed_tokens": "8"} | widths})
    job = stack.finish(stack.running(), others={"bit_width_map.json": found.to_json()})
    canvas = open_drawn(browser, f"/ui/jobs/{job.id}/map")
    assert not browser.find("[name=colour][value=bytes]").is_enabled()
    canvas.send_keys(Keys.ARROW_RIGHT)
    browser.shows("model.embed_tokens: width 8.00", "[data-reading]")  # alone in its row
    canvas.send_keys(Keys.ARROW_DOWN)
    browser.shows("experts.*.up_proj (4 linears): width 5.00", "[data-reading]")
    canvas.send_keys(Keys.ENTER)
    browser.shows("model.layers.0.mlp.experts.0.up_proj", "#groups h2")
    Select(browser.find("#groups select")).select_by_visible_text(list(widths)[3])
    browser.shows("1 of 8 bits", "#groups dl")


def test_saved_files_hold_the_numbers_of_every_group(
    browser: Browser, job: JobRecord, found: BitWidthMap, downloads: Path
) -> None:
    open_drawn(browser, f"/ui/jobs/{job.id}/map")
    for kind in ("csv", "json", "png"):
        browser.click(f"[data-save={kind}]")
    saved = {kind: downloads / f"map-{job.id}.{kind}" for kind in ("csv", "json")}
    picture = downloads / f"map-{job.id}-width.png"
    wait_for(whole(*saved.values(), picture), "the downloads")
    rows = list(csv.DictReader(saved["csv"].read_text().splitlines()))
    widths: dict[str, tuple[int, ...]] = {}
    for row in rows:
        widths[row["linear"]] = (*widths.get(row["linear"], ()), int(row["width"]))
    assert widths == found.linears
    assert all(float(row["sensitivity"]) > 0 and int(row["bytes"]) > 0 for row in rows)
    content = json.loads(saved["json"].read_text())
    assert {n: tuple(one["widths"]) for n, one in content["linears"].items()} == found.linears
    assert picture.read_bytes().startswith(b"\x89PNG")


def open_drawn(browser: Browser, path: str) -> WebElement:
    """Open a page with a map; the canvas, once it is drawn."""
    browser.open(path)
    canvas = browser.find(".map canvas")
    browser.until(canvas.is_displayed, "the map")
    return canvas


def test_the_slider_follows_the_hand_and_a_job_is_submitted(
    browser: Browser, stack: Stack, http: httpx2.Client, job: JobRecord
) -> None:
    open_drawn(browser, f"/ui/profiles/{job.profile_id}")
    browser.click("[name=kind][value=bits]")
    slider = browser.find("input[type=range]")
    before = browser.text("[data-fact=size]")
    pixels = "return document.querySelector('.map canvas').toDataURL()"
    picture = browser.run(pixels)
    # Dragging asks for nothing: what is shown changes in the same task.
    dragged = """
        const [slider, asked] = [arguments[0], performance.getEntriesByType("resource").length];
        slider.value = slider.max;
        slider.dispatchEvent(new Event("input"));
        return performance.getEntriesByType("resource").length - asked;"""
    assert browser.run(dragged, slider) == 0
    assert browser.text("[data-fact=size]") != before
    assert browser.run(pixels) != picture
    browser.fill("value", "3.4")
    slider.click()
    browser.fill("value", "3.4" + Keys.TAB)
    exact = http.post(
        f"/v1/profiles/{job.profile_id}/allocate", json={"budget": {"bits": 3.4}}
    ).json()
    browser.shows(f"{exact['bits']:.2f} ({exact['code_bits']:.2f} in codes)", "[data-fact=bits]")
    low, high = (float(x) for x in browser.text("[data-fact=range]").split(" to "))
    assert low < exact["predicted_loss"] < high
    browser.click_text("button", "Submit a job")
    browser.shows("queued", "#state")
    made = stack.context.jobs.get(browser.driver.current_url.rpartition("/")[2])
    assert made.spec["budget"]["bits"] == 3.4


def test_uniform_maps_are_marked_and_what_cannot_be_had_is_said(
    browser: Browser, job: JobRecord
) -> None:
    open_drawn(browser, f"/ui/profiles/{job.profile_id}")
    browser.click_text("button", "uniform 3")
    browser.shows("3.", "[data-fact=bits]")
    assert float(browser.find("[name=value]").get_attribute("value") or 0) > 0
    browser.fill("value", "0.1" + Keys.TAB)
    browser.shows("cannot be met", "#budget-error")
