"""The map explorer in headless Chromium: time until the map stands, and until it has other colours.

    python benchmarks/map_explorer.py --out benchmarks/results/map_explorer

A service on loopback holds one job each of two models made of shapes alone, with random costs and
errors. First paint is counted from the start of the navigation, HTML, scripts and numbers included,
with an empty cache, until the frame after the map was drawn; recolouring from the choice until the
frame after it, and a step of the budget slider likewise. The slider stands once the service has
found the 32 maps of the curve.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

from bitmill.io.atomic import write_bytes, write_json  # noqa: E402
from bitmill_service.main import create_app  # noqa: E402
from bitmill_service.settings import ServiceSettings  # noqa: E402
from bitmill_workers.store.migrate import upgrade  # noqa: E402
from finished import Stack  # noqa: E402
from finished_models import finish_model  # noqa: E402
from plans import llama_plan  # noqa: E402
from serving import serve  # noqa: E402

MODELS = {
    "Llama-2-70B": {"blocks": 80, "hidden": 8192, "inner": 28672, "kv": 1024},
    "Llama-3.1-405B": {"blocks": 126, "hidden": 16384, "inner": 53248, "kv": 1024},
}
COLOURS = ("sensitivity", "error", "bytes", "width")
PAINTED = "return performance.getEntriesByName('map-painted')[0]?.startTime"
RECOLOUR = """
const [colour, done] = arguments;
const choice = document.querySelector(`[name=colour][value=${colour}]`);
const begin = performance.now();
choice.checked = true;
choice.dispatchEvent(new Event("change"));
const drawn = performance.now();
const painted = () => done([drawn - begin, performance.now() - begin]);
requestAnimationFrame(() => requestAnimationFrame(painted));
"""

SLIDING = "return document.querySelector('input[type=range]').checkVisibility()"
SLIDE = """
const [share, done] = arguments;
const slider = document.querySelector("input[type=range]");
const begin = performance.now();
slider.value = Math.round(share * slider.max);
slider.dispatchEvent(new Event("input"));
const painted = () => done(performance.now() - begin);
requestAnimationFrame(() => requestAnimationFrame(painted));
"""


def browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("--headless=new", "--no-sandbox", "--window-size=1280,900"):
        options.add_argument(flag)
    return webdriver.Chrome(options, Service("/usr/bin/chromedriver"))


def measure(driver: webdriver.Chrome, url: str, pages: int) -> dict[str, Any]:
    """Milliseconds of `pages` openings and of every change of colour on them."""
    painted, work, frames = [], [], []
    for _ in range(pages):
        driver.execute_cdp_cmd("Network.clearBrowserCache", {})
        driver.get("about:blank")
        driver.get(url)
        WebDriverWait(driver, 60, 0.02).until(lambda found: found.execute_script(PAINTED))
        painted.append(driver.execute_script(PAINTED))
        for colour in COLOURS:
            script, frame = driver.execute_async_script(RECOLOUR, colour)
            work.append(script)
            frames.append(frame)
    return {
        "first_paint_ms": painted,
        "recolour_script_ms": work,
        "recolour_frame_ms": frames,
    }


def slide(driver: webdriver.Chrome, url: str, steps: int) -> dict[str, Any]:
    """Milliseconds until a profile's slider stands, and of every step of it."""
    begin = time.perf_counter()
    driver.get(url)
    WebDriverWait(driver, 120, 0.05).until(lambda found: found.execute_script(SLIDING))
    ready = 1000 * (time.perf_counter() - begin)
    shares = [(7 * step % steps) / steps for step in range(steps)]
    moved = [driver.execute_async_script(SLIDE, share) for share in shares]
    return {"slider_ready_ms": [ready], "slide_frame_ms": moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pages", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    args = parser.parse_args()
    found: dict[str, Any] = {
        "machine": platform.machine(),
        "load": os.getloadavg()[0],
        "models": {},
    }
    rows = []
    with tempfile.TemporaryDirectory() as data:
        app = create_app(ServiceSettings(data=Path(data)))
        upgrade(app.state.context.database)
        with serve(app) as url:
            driver = browser()
            try:
                found["browser"] = driver.capabilities["browserVersion"]
                for name, shape in MODELS.items():
                    plan = llama_plan(**shape)
                    job = finish_model(Stack(url, app.state.context), plan)
                    times = measure(driver, f"{url}/ui/jobs/{job.id}/map", args.pages)
                    times |= slide(driver, f"{url}/ui/profiles/{job.profile_id}", steps=20)
                    groups = sum(linear.groups for linear in plan.shapes)
                    found["models"][name] = {"groups": groups, **times}
                    cells = [name, str(shape["blocks"]), f"{groups:,}"]
                    for series in times.values():
                        cells.append(f"{statistics.median(series):.0f} ({max(series):.0f})")
                    rows.append(f"| {' | '.join(cells)} |")
            finally:
                driver.quit()
    names = ("shape", "blocks", "groups", "first paint", "recolour, script", "until the frame")
    head = f"| {' | '.join((*names, 'slider stands', 'slide, until the frame'))} |"
    title = (
        f"# The map explorer in headless Chromium {found['browser']}\n"
        f"`benchmarks/map_explorer.py`, {args.pages} pages each: median (largest) of milliseconds. "
        f"{os.cpu_count()} cores that browser and service share, load average "
        f"{found['load']:.1f} at the start.\n"
    )
    table = "\n".join([title, head, "|---|---|---|---|---|---|---|---|", *rows])
    write_json(args.out.with_suffix(".json"), found)
    write_bytes(args.out.with_suffix(".md"), f"{table}\n".encode())
    print(table)


if __name__ == "__main__":
    main()
