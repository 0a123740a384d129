"""Debian's Chromium without a screen, on the service's pages: what it shows, says and asks for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

AXE = Path(__file__).parent / "fixtures" / "axe-core" / "axe.min.js"
WIDTHS = {"wide": 1280, "phone": 390}
"""Pixels."""
THEMES = ("light", "dark")

T = TypeVar("T")


class Browser:
    """One window. `driver` is Selenium's."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver, self.url = driver, url
        self._asked: list[str] = []

    def open(self, path: str) -> None:
        """Go to a page of the service and wait until it is loaded."""
        self.driver.get(self.url + path)

    def leave(self) -> None:
        """Close the page, so that it asks nothing of a service that is about to end."""
        self.driver.get("about:blank")

    def find(self, selector: str) -> WebElement:
        """The first element of a CSS selector; waits for it."""
        return self.until(
            lambda: next(iter(self.driver.find_elements(By.CSS_SELECTOR, selector)), None), selector
        )

    def text(self, selector: str) -> str:
        """What an element shows; waits for it."""
        return str(self.until(lambda: self.find(selector).text, selector))

    def click(self, selector: str) -> None:
        """Click the first element of a selector, wherever it lies on the page."""
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def click_text(self, tag: str, text: str) -> None:
        """Click the button or link that says this."""
        path = f"//{tag}[normalize-space()='{text}']"
        self.until(
            lambda: next(iter(self.driver.find_elements(By.XPATH, path)), None), text
        ).click()

    def fill(self, name: str, value: str) -> None:
        """Type into the field of this name."""
        field = self.find(f"[name='{name}']")
        field.clear()
        field.send_keys(value)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns."""
        return self.driver.execute_script(script, *arguments)

    def until(self, look: Callable[[], T | None], what: str, timeout: float = 20) -> T:
        """Poll until `look` gives something true; fails with `what`."""
        wait = WebDriverWait(
            self.driver, timeout, 0.05, ignored_exceptions=[StaleElementReferenceException]
        )
        found: T = wait.until(lambda _: look(), what)
        return found

    def shows(self, text: str, selector: str = "main", timeout: float = 20) -> None:
        """Wait until an element shows this text."""
        self.until(lambda: text in self.find(selector).text, f"{selector}: {text}", timeout)

    def complaints(self) -> list[str]:
        """Warnings and errors of the console since the last call, but for refusals, which pages
        show."""
        said = self.driver.get_log("browser")
        serious = [entry["message"] for entry in said if entry["level"] in ("SEVERE", "WARNING")]
        return [text for text in serious if "the server responded with a status of 4" not in text]

    def strangers(self) -> list[str]:
        """Addresses of other hosts that the pages have asked for since the last call."""
        asked = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked.append(message["params"]["request"]["url"])
        own = urlsplit(self.url).netloc
        foreign = [a for a in asked if not a.startswith(("data:", "blob:"))]
        return [address for address in foreign if urlsplit(address).netloc != own]

    def violations(self, rules: str = "") -> list[str]:
        """Serious and critical faults that axe finds on the page as it is; `rules`: one of them."""
        if not self.run("return 'axe' in window"):
            self.run(AXE.read_text())
        options = {"resultTypes": ["violations"], **({"runOnly": [rules]} if rules else {})}
        found = self.driver.execute_async_script(
            "axe.run(arguments[0]).then(found => arguments[1](found.violations))", options
        )
        return [
            f"{fault['id']}: {fault['nodes'][0]['html']} ({fault['nodes'][0]['failureSummary']})"
            for fault in found
            if fault["impact"] in ("serious", "critical")
        ]

    def look(self, theme: str, width: int) -> None:
        """Show the page in a theme and at a width in pixels."""
        emulate = self.driver.execute_cdp_cmd
        scheme = [{"name": "prefers-color-scheme", "value": theme}]
        emulate("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        emulate("Emulation.setDeviceMetricsOverride", size)

    def picture(self, place: Path) -> None:
        """Write the whole page as a PNG."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return innerWidth")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.save_screenshot(str(place))


def whole(*files: Path) -> Callable[[], bool]:
    """Whether all of these have arrived: Chromium makes an empty file of each name first."""
    return lambda: all(file.exists() and file.stat().st_size for file in files)


@contextmanager
def browse(url: str, downloads: Path) -> Iterator[Browser]:
    """A browser for the service at `url`. Without Chromium: skips here, fails in CI."""
    program, driver_program = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver_program is None:
        missing = "chromium and chromedriver are not installed: apt-get install chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    options = Options()
    options.binary_location = program
    for switch in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-background-networking",
        "disable-component-update",
        "window-size=1280,900",
    ):
        options.add_argument(f"--{switch}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(driver_program))
    driver.set_page_load_timeout(30)
    try:
        yield Browser(driver, url)
    finally:
        driver.quit()
